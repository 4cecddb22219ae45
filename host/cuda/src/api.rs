//! NVIDIA's functions that are called, a table for each library. A library is used if it has all functions of its table, so that
//! what an older one lacks is said before anything is called; all of them are in CUDA 12.4 and in CUDA 13. Their numbers and structs are
//! cudarc's, which it generates from the headers of CUDA 12.4. Its own functions are looked up when they are first called, by the loader
//! alone, and panic where they are missing.

#![allow(non_snake_case)] // Functions and fields have NVIDIA's names.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys as cu;
use cudarc::nccl::sys as nccl;

/// A handle of something that only the library knows.
pub(super) type Handle = *mut c_void;

/// What a function returns: 0 where all is well. A plain number, since newer libraries may return values that older headers lack.
pub(super) type Status = c_int;

/// The functions of a library.
pub(super) trait Table: Sized + 'static {
    /// The library's name without prefix and suffix.
    const LIBRARY: &str;

    /// Looks all functions up.
    fn of(library: &libloading::Library) -> std::result::Result<Self, libloading::Error>;

    /// Where the table is kept that is used.
    fn cell() -> &'static OnceLock<Self>;
}

macro_rules! table {
    ($(#[$doc:meta])* $table:ident of $library:literal: $($name:ident($($argument:ty),*) -> $returns:ty;)*) => {
        $(#[$doc])*
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $returns,)*
        }

        impl $table {
            /// The functions' names.
            pub(super) const NAMES: &[&str] = &[$(stringify!($name)),*];
        }

        impl Table for $table {
            const LIBRARY: &str = $library;

            fn of(library: &libloading::Library) -> std::result::Result<$table, libloading::Error> {
                // SAFETY: the types are those of NVIDIA's headers; the library is never closed.
                unsafe { Ok($table { $($name: *library.get(stringify!($name).as_bytes())?,)* }) }
            }

            fn cell() -> &'static OnceLock<$table> {
                static CELL: OnceLock<$table> = OnceLock::new();
                &CELL
            }
        }
    };
}

table! {
    /// The driver.
    Driver of "cuda":
    cuInit(c_uint) -> Status;
    cuDriverGetVersion(*mut c_int) -> Status;
    cuGetErrorString(Status, *mut *const c_char) -> Status;
    cuDeviceGetCount(*mut c_int) -> Status;
    cuDeviceGet(*mut c_int, c_int) -> Status;
    cuDeviceGetName(*mut c_char, c_int, c_int) -> Status;
    cuDeviceGetUuid_v2(*mut [u8; 16], c_int) -> Status;
    cuDeviceGetAttribute(*mut c_int, c_int, c_int) -> Status;
    cuDevicePrimaryCtxRetain(*mut Handle, c_int) -> Status;
    cuCtxSetCurrent(Handle) -> Status;
    cuStreamCreate(*mut Handle, c_uint) -> Status;
    cuStreamSynchronize(Handle) -> Status;
    cuStreamWaitEvent(Handle, Handle, c_uint) -> Status;
    cuEventCreate(*mut Handle, c_uint) -> Status;
    cuEventRecord(Handle, Handle) -> Status;
    cuEventElapsedTime(*mut f32, Handle, Handle) -> Status;
    cuEventDestroy_v2(Handle) -> Status;
    cuMemAlloc_v2(*mut u64, usize) -> Status;
    cuMemFree_v2(u64) -> Status;
    cuMemHostAlloc(*mut Handle, usize, c_uint) -> Status;
    cuMemFreeHost(Handle) -> Status;
    cuMemHostRegister_v2(*mut c_void, usize, c_uint) -> Status;
    cuMemHostUnregister(*mut c_void) -> Status;
    cuMemGetInfo_v2(*mut usize, *mut usize) -> Status;
    cuMemcpyAsync(u64, u64, usize, Handle) -> Status;
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, Handle) -> Status;
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, Handle) -> Status;
    cuMemcpy2DAsync_v2(*const Copy2d, Handle) -> Status;
    cuMemsetD8Async(u64, u8, usize, Handle) -> Status;
    cuModuleLoadData(*mut Handle, *const c_void) -> Status;
    cuModuleGetFunction(*mut Handle, Handle, *const c_char) -> Status;
    cuFuncSetAttribute(Handle, c_int, c_int) -> Status;
    cuLaunchKernelEx(*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void) -> Status;
    cuTensorMapEncodeTiled(
        *mut c_void, c_uint, c_uint, *const c_void, *const u64, *const u64, *const u32, *const u32, c_uint, c_uint,
        c_uint, c_uint
    ) -> Status;
}

pub(super) const CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: c_int =
    cu::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as c_int;
pub(super) const CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: c_int =
    cu::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as c_int;
pub(super) const CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: c_int =
    cu::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as c_int;
pub(super) const CU_EVENT_DEFAULT: c_uint = cu::CUevent_flags::CU_EVENT_DEFAULT as c_uint;
pub(super) const CU_EVENT_DISABLE_TIMING: c_uint = cu::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
pub(super) const CU_EVENT_WAIT_DEFAULT: c_uint = cu::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT as c_uint;
pub(super) const CU_STREAM_NON_BLOCKING: c_uint = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
pub(super) const CU_MEMORYTYPE_HOST: cu::CUmemorytype = cu::CUmemorytype::CU_MEMORYTYPE_HOST;
pub(super) const CU_MEMORYTYPE_DEVICE: cu::CUmemorytype = cu::CUmemorytype::CU_MEMORYTYPE_DEVICE;
pub(super) const CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int =
    cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as c_int;

pub(super) const CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: c_uint =
    cu::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as c_uint;
pub(super) const CU_TENSOR_MAP_INTERLEAVE_NONE: c_uint =
    cu::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE as c_uint;
pub(super) const CU_TENSOR_MAP_SWIZZLE_64B: c_uint = cu::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B as c_uint;
pub(super) const CU_TENSOR_MAP_SWIZZLE_128B: c_uint = cu::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B as c_uint;
pub(super) const CU_TENSOR_MAP_L2_PROMOTION_L2_128B: c_uint =
    cu::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B as c_uint;
pub(super) const CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE: c_uint =
    cu::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE as c_uint;

pub(super) use cu::CUDA_MEMCPY2D as Copy2d;

pub(super) use cu::CUlaunchConfig as LaunchConfig;

/// Of a launch: that it may begin while the kernel before it ends, for which the new one waits by itself.
pub(super) fn early_launch() -> cu::CUlaunchAttribute {
    let value = cu::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
    let id = cu::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    cu::CUlaunchAttribute { id, pad: [0; 4], value }
}

table! {
    /// The compiler.
    Nvrtc of "nvrtc":
    nvrtcVersion(*mut c_int, *mut c_int) -> Status;
    nvrtcGetErrorString(Status) -> *const c_char;
    nvrtcGetNumSupportedArchs(*mut c_int) -> Status;
    nvrtcGetSupportedArchs(*mut c_int) -> Status;
    nvrtcCreateProgram(
        *mut Handle, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
    ) -> Status;
    nvrtcDestroyProgram(*mut Handle) -> Status;
    nvrtcCompileProgram(Handle, c_int, *const *const c_char) -> Status;
    nvrtcGetProgramLogSize(Handle, *mut usize) -> Status;
    nvrtcGetProgramLog(Handle, *mut c_char) -> Status;
    nvrtcGetCUBINSize(Handle, *mut usize) -> Status;
    nvrtcGetCUBIN(Handle, *mut c_char) -> Status;
}

table! {
    /// The matmuls.
    CublasLt of "cublasLt":
    cublasLtCreate(*mut Handle) -> Status;
    cublasLtDestroy(Handle) -> Status;
    cublasLtGetVersion() -> usize;
    cublasLtGetStatusName(Status) -> *const c_char;
    cublasLtMatmul(
        Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void, *const c_void,
        Handle, *mut c_void, Handle, *const Algorithm, *mut c_void, usize, Handle
    ) -> Status;
    cublasLtMatmulAlgoCheck(
        Handle, Handle, Handle, Handle, Handle, Handle, *const Algorithm, *mut Heuristic
    ) -> Status;
    cublasLtMatmulAlgoGetHeuristic(
        Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Heuristic, *mut c_int
    ) -> Status;
    cublasLtMatmulDescCreate(*mut Handle, c_int, c_int) -> Status;
    cublasLtMatmulDescDestroy(Handle) -> Status;
    cublasLtMatmulDescSetAttribute(Handle, c_int, *const c_void, usize) -> Status;
    cublasLtMatmulPreferenceCreate(*mut Handle) -> Status;
    cublasLtMatmulPreferenceDestroy(Handle) -> Status;
    cublasLtMatmulPreferenceSetAttribute(Handle, c_int, *const c_void, usize) -> Status;
    cublasLtMatrixLayoutCreate(*mut Handle, c_int, u64, u64, i64) -> Status;
    cublasLtMatrixLayoutDestroy(Handle) -> Status;
}

pub(super) const CUBLAS_STATUS_NOT_SUPPORTED: Status = lt::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED as Status;
pub(super) const CUBLAS_COMPUTE_32F: c_int = lt::cublasComputeType_t::CUBLAS_COMPUTE_32F as c_int;
pub(super) const CUDA_R_32F: c_int = lt::cudaDataType_t::CUDA_R_32F as c_int;
pub(super) const CUDA_R_16BF: c_int = lt::cudaDataType_t::CUDA_R_16BF as c_int;
pub(super) const CUBLASLT_MATMUL_DESC_TRANSA: c_int =
    lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA as c_int;
pub(super) const CUBLASLT_MATMUL_DESC_TRANSB: c_int =
    lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB as c_int;
pub(super) const CUBLASLT_MATMUL_DESC_EPILOGUE: c_int =
    lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE as c_int;
pub(super) const CUBLASLT_MATMUL_DESC_BIAS_POINTER: c_int =
    lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER as c_int;
pub(super) const CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: c_int =
    lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE as c_int;
pub(super) const CUBLASLT_EPILOGUE_BIAS: c_uint = lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as c_uint;
pub(super) const CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: c_int =
    lt::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as c_int;
pub(super) const CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: c_int =
    lt::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK as c_int;
pub(super) const CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: c_int =
    lt::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES as c_int;
pub(super) const CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: c_int =
    lt::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES as c_int;
pub(super) const CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: c_int =
    lt::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES as c_int;
pub(super) const CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: c_int =
    lt::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES as c_int;
pub(super) const CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: c_uint =
    lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as c_uint;

/// `cublasLtMatmulAlgo_t`: an algorithm, as its library writes it.
pub(super) type Algorithm = [u64; 8];

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Default)]
#[repr(C)]
pub(super) struct Heuristic {
    pub algo: Algorithm,
    pub workspaceSize: usize,
    pub state: Status,
    pub wavesCount: f32,
    pub reserved: [c_int; 4],
}

table! {
    /// Sums over GPUs.
    NcclTable of "nccl":
    ncclGetErrorString(Status) -> *const c_char;
    ncclGetUniqueId(*mut UniqueId) -> Status;
    ncclCommInitRank(*mut Handle, c_int, UniqueId, c_int) -> Status;
    ncclCommAbort(Handle) -> Status;
    ncclAllReduce(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Handle) -> Status;
    ncclAllGather(*const c_void, *mut c_void, usize, c_int, Handle, Handle) -> Status;
}

pub(super) const NCCL_UINT8: c_int = nccl::ncclDataType_t::ncclUint8 as c_int;
pub(super) const NCCL_FLOAT32: c_int = nccl::ncclDataType_t::ncclFloat32 as c_int;
pub(super) const NCCL_SUM: c_int = nccl::ncclRedOp_t::ncclSum as c_int;

pub(super) use nccl::ncclUniqueId as UniqueId;

/// A text that a library keeps for as long as it is open.
///
/// # Safety
/// The address is null or of a text that ends with a zero and stays.
pub(super) unsafe fn text(at: *const c_char) -> String {
    if at.is_null() {
        return "an error without a name".into();
    }
    // SAFETY: as the caller says.
    unsafe { std::ffi::CStr::from_ptr(at) }.to_string_lossy().into_owned()
}
