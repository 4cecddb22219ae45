//! cuBLASLt: what it says of its algorithms for a matmul, and how one is started.

use std::ffi::{c_int, c_void};
use std::fmt::Display;
use std::ptr;

use super::super::api::{self, Algorithm, CublasLt, Handle, Heuristic, Status};
use super::super::gpu::{Address, Gpu, Memory};
use super::super::libraries;
use super::{Matmul, Operands};
use dpo_core::error::{Error, Result};

/// Scratch of the matmuls.
pub(crate) const WORKSPACE: usize = 64 << 20;

/// cuBLASLt on one GPU.
pub(super) struct Library {
    handle: Handle,
    functions: &'static CublasLt,
    workspace: Memory,
}

/// A matmul as cuBLASLt describes it.
pub(super) struct Plan {
    description: Handle,
    preference: Handle,
    layouts: [Handle; 4],
}

/// What a function of cuBLASLt returned, as a result.
fn done(library: &CublasLt, what: impl Display, status: Status) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: cuBLASLt returns a text that it keeps.
    let said = unsafe { api::text((library.cublasLtGetStatusName)(status)) };
    Err(Error::run(format!("cuBLASLt: {what}: {said}")))
}

impl Library {
    pub(super) fn new(gpu: &Gpu) -> Result<Library> {
        let functions = libraries::table::<CublasLt>()?;
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        done(functions, "starting", unsafe { (functions.cublasLtCreate)(&mut handle) })?;
        Ok(Library { handle, functions, workspace: gpu.allocate(WORKSPACE)? })
    }

    /// Its scratch.
    pub(super) fn workspace(&self) -> Address {
        self.workspace.address
    }

    /// Its version, such as 130100.
    pub(super) fn version(&self) -> usize {
        // SAFETY: takes nothing and returns a number.
        unsafe { (self.functions.cublasLtGetVersion)() }
    }

    /// Starts a matmul.
    pub(super) fn start(
        &self,
        gpu: &Gpu,
        matmul: &Matmul,
        plan: &Plan,
        algorithm: &Algorithm,
        on: Operands,
    ) -> Result<()> {
        let (alpha, beta) = (1.0_f32, if matmul.add { 1.0_f32 } else { 0.0 });
        let number = |v: &f32| (v as *const f32).cast::<c_void>();
        let at = |a: Address| a as *const c_void;
        // SAFETY: the plan was made for these layouts; addresses are of the device. In columns, as cuBLASLt counts,
        // the matmul reads Dᵀ = op(B)ᵀ · op(A)ᵀ.
        unsafe {
            if matmul.bias {
                let status = (self.functions.cublasLtMatmulDescSetAttribute)(
                    plan.description,
                    api::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    (&raw const on.bias).cast(),
                    size_of::<Address>(),
                );
                done(self.functions, matmul, status)?;
            }
            let status = (self.functions.cublasLtMatmul)(
                self.handle,
                plan.description,
                number(&alpha),
                at(on.b.at),
                plan.layouts[1],
                at(on.a.at),
                plan.layouts[0],
                number(&beta),
                at(if matmul.add { on.c.at } else { on.d.at }),
                plan.layouts[2],
                on.d.at as *mut c_void,
                plan.layouts[3],
                algorithm,
                self.workspace.address as *mut c_void,
                WORKSPACE,
                gpu.stream(),
            );
            done(self.functions, matmul, status)
        }
    }

    /// Describes a matmul.
    pub(super) fn plan(&self, p: &Matmul) -> Result<Plan> {
        let library = self.functions;
        let narrow = api::CUDA_R_16BF;
        let out = if p.wide { api::CUDA_R_32F } else { narrow };
        // Rows of ours are columns of cuBLASLt's.
        let layout = |rows: usize, columns: usize, ld: i64, dtype| -> Result<Handle> {
            let mut layout = ptr::null_mut();
            let (rows, columns) = (columns as u64, rows as u64);
            // SAFETY: writes one handle.
            done(library, p, unsafe { (library.cublasLtMatrixLayoutCreate)(&mut layout, dtype, rows, columns, ld) })?;
            Ok(layout)
        };
        let a = if p.a_transposed { layout(p.k, p.m, p.lds[0], narrow) } else { layout(p.m, p.k, p.lds[0], narrow) }?;
        let b = if p.b_transposed { layout(p.n, p.k, p.lds[1], narrow) } else { layout(p.k, p.n, p.lds[1], narrow) }?;
        let layouts =
            [a, b, layout(p.m, p.n, if p.add { p.lds[2] } else { p.lds[3] }, out)?, layout(p.m, p.n, p.lds[3], out)?];
        let (mut description, mut preference) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: writes one handle each.
        unsafe {
            let (sums, scales) = (api::CUBLAS_COMPUTE_32F, api::CUDA_R_32F);
            done(library, p, (library.cublasLtMatmulDescCreate)(&mut description, sums, scales))?;
            done(library, p, (library.cublasLtMatmulPreferenceCreate)(&mut preference))?;
        }
        let operation = |transposed: bool| -> i32 { i32::from(transposed) };
        // SAFETY: every attribute is given with its type's size; handles are alive.
        unsafe {
            let set = |which, value: *const c_void, size| {
                done(library, p, (library.cublasLtMatmulDescSetAttribute)(description, which, value, size))
            };
            // cuBLASLt's first matrix is our B.
            let (first, second) = (operation(p.b_transposed), operation(p.a_transposed));
            set(api::CUBLASLT_MATMUL_DESC_TRANSA, (&raw const first).cast(), 4)?;
            set(api::CUBLASLT_MATMUL_DESC_TRANSB, (&raw const second).cast(), 4)?;
            if p.bias {
                let epilogue = api::CUBLASLT_EPILOGUE_BIAS;
                set(api::CUBLASLT_MATMUL_DESC_EPILOGUE, (&raw const epilogue).cast(), size_of_val(&epilogue))?;
                let dtype = narrow;
                set(api::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, (&raw const dtype).cast(), size_of_val(&dtype))?;
            }
            let prefer = |which, value: *const c_void, size| {
                done(library, p, (library.cublasLtMatmulPreferenceSetAttribute)(preference, which, value, size))
            };
            let bytes = WORKSPACE;
            prefer(api::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const bytes).cast(), size_of_val(&bytes))?;
            // Sums over parts go through the workspace in a fixed order: two runs are equal bit for bit.
            let reduction = api::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
            prefer(api::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const reduction).cast(), 4)?;
            let sides = [
                (api::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, p.alignments[1]),
                (api::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, p.alignments[0]),
                (api::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, p.alignments[if p.add { 2 } else { 3 }]),
                (api::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, p.alignments[3]),
            ];
            for (which, bytes) in sides {
                prefer(which, (&raw const bytes).cast(), 4)?;
            }
            Ok(Plan { description, preference, layouts })
        }
    }

    /// Whether an algorithm that was timed for a class can run this shape.
    pub(super) fn fits(&self, plan: &Plan, algorithm: &Algorithm) -> bool {
        let [a, b, c, d] = plan.layouts;
        let mut answer = Heuristic::default();
        let check = self.functions.cublasLtMatmulAlgoCheck;
        // SAFETY: handles are alive; writes one answer.
        let status = unsafe { check(self.handle, plan.description, b, a, c, d, algorithm, &mut answer) };
        status == 0 && answer.workspaceSize <= WORKSPACE
    }

    /// At most so many algorithms for a shape, as cuBLASLt ranks them; at least one.
    pub(super) fn candidates(&self, matmul: &Matmul, plan: &Plan, asked: usize) -> Result<Vec<Algorithm>> {
        let [a, b, c, d] = plan.layouts;
        let mut found = vec![Heuristic::default(); asked];
        let mut count = 0;
        // SAFETY: handles are alive; `found` has room for as many as are asked for.
        let status = unsafe {
            (self.functions.cublasLtMatmulAlgoGetHeuristic)(
                self.handle,
                plan.description,
                b,
                a,
                c,
                d,
                plan.preference,
                asked as c_int,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        done(self.functions, matmul, status)?;
        let good: Vec<_> = found.iter().take(count as usize).filter(|f| f.state == 0).map(|f| f.algo).collect();
        if good.is_empty() {
            done(self.functions, matmul, api::CUBLAS_STATUS_NOT_SUPPORTED)?;
        }
        Ok(good)
    }

    /// Frees a plan.
    pub(super) fn destroy(&self, matmul: &Matmul, plan: Plan) -> Result<()> {
        let library = self.functions;
        // SAFETY: made by `plan`, destroyed once.
        unsafe {
            done(library, matmul, (library.cublasLtMatmulDescDestroy)(plan.description))?;
            done(library, matmul, (library.cublasLtMatmulPreferenceDestroy)(plan.preference))?;
            plan.layouts.iter().try_for_each(|l| done(library, matmul, (library.cublasLtMatrixLayoutDestroy)(*l)))
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { (self.functions.cublasLtDestroy)(self.handle) };
    }
}
