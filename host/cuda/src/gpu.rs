//! One GPU: its context, its stream, its memory, launches and their times.
//!
//! This, `matmul/library.rs`, `kernels.rs` and `nccl.rs` are the only places that call the functions of `api.rs`. Addresses on the device are plain numbers: a wrong one is an
//! error of the device, which ends the run, and never touches memory of this process.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr;

use super::api::{self, Driver, Handle, Status};
use super::libraries;
use dpo_core::error::{Error, Result};
use dpo_core::memory::zeros;
use dpo_core::progress;

/// An address on the device, or in host memory that the device can read.
pub(super) type Address = u64;

/// A GPU with one stream, on which everything runs in order.
pub struct Gpu {
    /// What the driver calls it.
    pub name: String,
    /// Compute capability, such as 90.
    pub capability: u32,
    /// The compute capability whose kernels it runs: its own, unless an older one was asked for.
    pub kernels: u32,
    /// Its multiprocessors.
    pub multiprocessors: usize,
    /// The same for a card wherever it is seen from.
    pub uuid: [u8; 16],
    stream: Handle,
    /// Times of labelled work, where somebody asked for them.
    trace: RefCell<Option<Trace>>,
    driver: &'static Driver,
}

/// Events between labelled pieces of work.
#[derive(Default)]
struct Trace {
    marks: Vec<(&'static str, Handle)>,
}

/// A compiled kernel.
#[derive(Clone, Copy)]
pub struct Kernel {
    function: Handle,
    name: &'static str,
    /// Whether it waits by itself for what was started before it.
    waits: bool,
}

/// Memory of the device, or of the host for the device alone, freed when dropped.
pub struct Memory {
    pub address: Address,
    pub bytes: usize,
    /// What it lies in, where that is the host's.
    host: Option<Vec<u64>>,
    driver: &'static Driver,
}

/// Host memory that the device reads and writes directly.
pub struct Pinned {
    start: *mut u8,
    bytes: usize,
    driver: &'static Driver,
}

/// A second stream, for work beside that of the main one.
pub(super) struct SideStream {
    pub(super) stream: Handle,
    event: Handle,
}

/// Bytes of a page of the host's memory, which what is pinned begins at.
const PAGE: usize = 4096;

/// Arguments of a kernel, laid out one after the other.
#[derive(Default)]
pub struct Args {
    /// Every argument at a place as aligned as any needs.
    slots: Vec<Slot>,
}

/// Room for one argument.
#[repr(align(64))]
struct Slot([u64; 16]);

/// A value that a kernel takes as an argument, as its bytes.
///
/// # Safety
/// The type has no padding that matters to the kernel and is at most 128 bytes long.
pub unsafe trait Argument: Copy {}

// SAFETY: plain numbers.
unsafe impl Argument for i32 {}
// SAFETY: as above.
unsafe impl Argument for u32 {}
// SAFETY: as above.
unsafe impl Argument for i64 {}
// SAFETY: as above.
unsafe impl Argument for u64 {}
// SAFETY: as above.
unsafe impl Argument for f32 {}

/// Rows on the device, `ld` elements apart: `struct View` of `common.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub(super) struct View {
    pub at: Address,
    pub ld: i64,
}

// SAFETY: two numbers of eight bytes.
unsafe impl Argument for View {}

/// A matrix that a kernel copies to shared memory box by box (CUDA Driver API, tensor map object management): a kernel takes it as
/// `const __grid_constant__ TensorMap`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct TensorMap([u64; 16]);

// SAFETY: 128 bytes that the driver wrote.
unsafe impl Argument for TensorMap {}

impl TensorMap {
    /// bf16 `[rows, columns]` in boxes of so many; see [`encode`](Self::encode).
    pub(super) fn new(of: View, [rows, columns]: [usize; 2], [box_rows, box_columns]: [usize; 2]) -> Result<TensorMap> {
        let boxes = [box_columns as u32, box_rows as u32];
        TensorMap::encode(of.at, 2, &[columns as u64, rows as u64], &[of.ld as u64 * 2], &boxes)
    }

    /// Elements of two bytes, which are bf16, or of one, of some sizes, from the inner one out, the outer ones so many bytes apart; in boxes
    /// with rows of 64 or 128 bytes, which are swizzled. What a box has beyond the matrix is zero.
    ///
    /// # Errors
    /// Rows that are no multiple of 16 bytes apart, or begin at no such address.
    pub(super) fn encode(
        at: Address,
        element: u32,
        sizes: &[u64],
        strides: &[u64],
        boxes: &[u32],
    ) -> Result<TensorMap> {
        if strides.len() + 1 != sizes.len() || boxes.len() != sizes.len() {
            return Err(Error::run("a matrix of as many sizes as it has not"));
        }
        let kind = match element {
            1 => api::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            _ => api::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let swizzle = match boxes[0] * element {
            128 => api::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => api::CU_TENSOR_MAP_SWIZZLE_64B,
        };
        let (driver, ones) = (libraries::table::<Driver>()?, vec![1_u32; sizes.len()]);
        let mut map = TensorMap([0; 16]);
        // SAFETY: writes the map, whose alignment is 64; reads as many numbers of each list as there are sizes, of strides one fewer.
        let status = unsafe {
            (driver.cuTensorMapEncodeTiled)(
                map.0.as_mut_ptr().cast(),
                kind,
                sizes.len() as u32,
                at as *const c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                ones.as_ptr(),
                api::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                api::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                api::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        done("describing a matrix", status)?;
        Ok(map)
    }
}

impl View {
    /// Itself, unless it is null: of a write that nobody reads.
    pub(super) fn wanted(self) -> Option<View> {
        (self.at != 0).then_some(self)
    }

    /// The same rows from a column on.
    pub(super) fn column(self, column: usize) -> View {
        View { at: self.at + (column * 2) as u64, ld: self.ld }
    }

    /// From a row on.
    pub(super) fn row(self, row: usize) -> View {
        View { at: self.at + row as u64 * self.ld as u64 * 2, ld: self.ld }
    }
}

impl Args {
    /// One more argument.
    pub fn with<T: Argument>(mut self, value: T) -> Args {
        const { assert!(size_of::<T>() <= size_of::<Slot>()) }
        let mut slot = Slot([0; 16]);
        // SAFETY: a slot holds its bytes.
        unsafe {
            ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), slot.0.as_mut_ptr().cast(), size_of::<T>())
        };
        self.slots.push(slot);
        self
    }
}

/// What a function of the driver returned, as a result.
fn done(what: &str, status: Status) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    let mut said = ptr::null();
    // SAFETY: the driver writes the address of a text that it keeps, or null.
    let said = unsafe {
        (libraries::table::<Driver>()?.cuGetErrorString)(status, &mut said);
        api::text(said)
    };
    Err(Error::run(format!("CUDA: {what}: {said} ({status})")))
}

/// How many GPUs the driver shows. The libraries have been found before.
pub fn count() -> Result<usize> {
    let driver = libraries::table::<Driver>()?;
    let mut count = 0;
    // SAFETY: 0 is the only flag there is; writes one number.
    unsafe {
        done("starting the driver", (driver.cuInit)(0))?;
        done("counting GPUs", (driver.cuDeviceGetCount)(&mut count))?;
    }
    Ok(count as usize)
}

/// A further stream, which does not wait for the one that has no name.
fn new_stream(driver: &Driver) -> Result<Handle> {
    let mut stream = ptr::null_mut();
    // SAFETY: a context is current; writes one handle.
    done("opening a stream", unsafe { (driver.cuStreamCreate)(&mut stream, api::CU_STREAM_NON_BLOCKING) })?;
    Ok(stream)
}

fn new_event(driver: &Driver, flags: u32) -> Result<Handle> {
    let mut event = ptr::null_mut();
    // SAFETY: a context is current; writes one handle.
    done("making an event", unsafe { (driver.cuEventCreate)(&mut event, flags) })?;
    Ok(event)
}

impl Gpu {
    /// Opens the GPU of an index.
    pub fn open(index: usize) -> Result<Gpu> {
        let count = count()?;
        if index >= count {
            return Err(Error::input(format!("there is no GPU {index}: the driver shows {count}")).at("--device"));
        }
        let driver = libraries::table::<Driver>()?;
        let (mut device, mut name, mut uuid): (_, [c_char; 256], _) = (0, [0; 256], [0; 16]);
        let (mut major, mut minor, mut multiprocessors): (c_int, c_int, c_int) = (0, 0, 0);
        let mut context = ptr::null_mut();
        // SAFETY: the functions write what they are given the address of, at most as many bytes of the name as it has room for, which
        // ends with a zero then. The context stays for as long as the process.
        let name = unsafe {
            done("opening the GPU", (driver.cuDeviceGet)(&mut device, index as c_int))?;
            let room = name.len() as c_int;
            done("asking for the GPU's name", (driver.cuDeviceGetName)(name.as_mut_ptr(), room, device))?;
            done("asking for the GPU's id", (driver.cuDeviceGetUuid_v2)(&mut uuid, device))?;
            for (to, which) in [
                (&mut major, api::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
                (&mut minor, api::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
                (&mut multiprocessors, api::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            ] {
                done("asking what the GPU can do", (driver.cuDeviceGetAttribute)(to, which, device))?;
            }
            done("opening the GPU", (driver.cuDevicePrimaryCtxRetain)(&mut context, device))?;
            done("opening the GPU", (driver.cuCtxSetCurrent)(context))?;
            api::text(name.as_ptr())
        };
        let stream = new_stream(driver)?;
        let capability = (major * 10 + minor) as u32;
        Ok(Gpu {
            name,
            capability,
            kernels: capability,
            multiprocessors: multiprocessors as usize,
            uuid,
            stream,
            trace: RefCell::new(None),
            driver,
        })
    }

    /// With the kernels that are written for an older generation, such as 80; with its own, where none is named.
    ///
    /// # Errors
    /// A newer generation than its own.
    pub fn with_kernels(self, capability: Option<u32>) -> Result<Gpu> {
        let kernels = capability.unwrap_or(self.capability);
        if kernels > self.capability {
            let what = format!("{} has no instructions of sm_{kernels}", self.name);
            return Err(Error::input(what).at("--kernels").help(format!("it is sm_{}", self.capability)));
        }
        Ok(Gpu { kernels, ..self })
    }

    pub(super) fn stream(&self) -> Handle {
        self.stream
    }

    /// A further stream.
    pub(super) fn side_stream(&self) -> Result<SideStream> {
        let event = new_event(self.driver, api::CU_EVENT_DISABLE_TIMING)?;
        Ok(SideStream { stream: new_stream(self.driver)?, event })
    }

    /// Lets what is started from now on in a side stream wait for everything that was started in the main one.
    pub(super) fn wait_for_main(&self, side: &SideStream) -> Result<()> {
        self.order(self.stream, side.stream, side.event)
    }

    /// Lets what is started from now on in the main stream wait for everything in a side stream.
    pub(super) fn wait_for_side(&self, side: &SideStream) -> Result<()> {
        self.order(side.stream, self.stream, side.event)
    }

    /// Copies bytes of the device or of pinned memory to either.
    pub(super) fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.copy_in(self.stream, from, to, bytes)
    }

    /// The same in a side stream.
    pub(super) fn copy_beside(&self, side: &SideStream, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.copy_in(side.stream, from, to, bytes)
    }

    fn copy_in(&self, stream: Handle, from: Address, to: Address, bytes: usize) -> Result<()> {
        // SAFETY: addresses of the device, or of host memory that the driver allocated.
        done("copying", unsafe { (self.driver.cuMemcpyAsync)(to, from, bytes, stream) })
    }

    /// Free and all bytes of the GPU.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let (mut free, mut all) = (0, 0);
        // SAFETY: writes two numbers.
        done("asking for free memory", unsafe { (self.driver.cuMemGetInfo_v2)(&mut free, &mut all) })?;
        Ok((free, all))
    }

    /// Memory on the device.
    pub fn allocate(&self, bytes: usize) -> Result<Memory> {
        let mut address = 0;
        // SAFETY: the context is current; the memory is written before it is read.
        done("allocating memory", unsafe { (self.driver.cuMemAlloc_v2)(&mut address, bytes.max(256)) })
            .map_err(|e| e.help(format!("{} were asked for", dpo_core::memory::size(bytes))))?;
        Ok(Memory { address, bytes, host: None, driver: self.driver })
    }

    /// Host memory that only the device reads and writes. The driver would take ten times as long to allocate as much, page by page.
    pub(super) fn allocate_on_host(&self, bytes: usize) -> Result<Memory> {
        let bytes = bytes.next_multiple_of(PAGE);
        let mut host = zeros((bytes + PAGE) / size_of::<u64>());
        let address = (host.as_mut_ptr() as Address).next_multiple_of(PAGE as Address);
        // SAFETY: the memory is `host`'s, which is kept, is written by the device alone, and is unregistered before it is freed.
        done("pinning host memory", unsafe { (self.driver.cuMemHostRegister_v2)(address as Handle, bytes, 0) })
            .map_err(|e| e.help(format!("{} were to be pinned", dpo_core::memory::size(bytes))))?;
        Ok(Memory { address, bytes, host: Some(host), driver: self.driver })
    }

    /// Host memory that the device can read.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned> {
        let mut start = ptr::null_mut();
        // SAFETY: the context is current; writes one address.
        done("allocating pinned memory", unsafe { (self.driver.cuMemHostAlloc)(&mut start, bytes.max(256), 0) })?;
        // SAFETY: the memory was just allocated with this size.
        unsafe { ptr::write_bytes(start.cast::<u8>(), 0, bytes.max(256)) };
        Ok(Pinned { start: start.cast(), bytes, driver: self.driver })
    }

    /// Copies bytes of pinned memory to the device, `rows` of `row` bytes that lie `pitch` apart there.
    pub fn upload_rows(&self, from: &[u8], to: Address, row: usize, rows: usize, pitch: usize) -> Result<()> {
        if from.len() < row * rows {
            return Err(Error::run("an upload is longer than its source"));
        }
        let copy = api::Copy2d {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: api::CU_MEMORYTYPE_HOST,
            srcHost: from.as_ptr().cast(),
            srcDevice: 0,
            srcArray: ptr::null_mut(),
            srcPitch: row,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: api::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: to,
            dstArray: ptr::null_mut(),
            dstPitch: pitch,
            WidthInBytes: row,
            Height: rows,
        };
        // SAFETY: the source is as long as was checked; callers keep it until `finish`.
        done("copying to the GPU", unsafe { (self.driver.cuMemcpy2DAsync_v2)(&copy, self.stream) })
    }

    /// Copies to the device.
    pub fn upload<T: Copy>(&self, from: &[T], to: Address) -> Result<()> {
        // SAFETY: plain numbers, read until the copy is done: pageable memory is staged before the call returns, and
        // pinned memory is kept until `finish`.
        let status =
            unsafe { (self.driver.cuMemcpyHtoDAsync_v2)(to, from.as_ptr().cast(), size_of_val(from), self.stream) };
        done("copying to the GPU", status)
    }

    /// Copies from the device and waits for it.
    pub fn download<T: Copy>(&self, from: Address, to: &mut [T]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: `to` outlives the copy, which is waited for.
        let status =
            unsafe { (self.driver.cuMemcpyDtoHAsync_v2)(to.as_mut_ptr().cast(), from, size_of_val(to), self.stream) };
        done("copying from the GPU", status)?;
        self.finish()
    }

    /// Sets bytes to zero.
    pub fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        // SAFETY: an address of the device.
        done("clearing memory", unsafe { (self.driver.cuMemsetD8Async)(at, 0, bytes, self.stream) })
    }

    /// Waits for everything that was started.
    pub fn finish(&self) -> Result<()> {
        // SAFETY: the stream is alive.
        done("running", unsafe { (self.driver.cuStreamSynchronize)(self.stream) })?;
        progress::advance();
        Ok(())
    }

    /// Kernels of a compiled module, by name; whether they wait by themselves for what was started before them.
    pub fn load(&self, image: &[u8], names: &[&'static str], waits: bool) -> Result<Vec<Kernel>> {
        let mut module = ptr::null_mut();
        // SAFETY: the image is a whole cubin, as NVRTC made it. Modules are never unloaded.
        done("loading kernels", unsafe { (self.driver.cuModuleLoadData)(&mut module, image.as_ptr().cast()) })?;
        let find = |name: &&'static str| {
            let text = CString::new(*name).map_err(|_| Error::run("a kernel's name has a zero"))?;
            let mut function = ptr::null_mut();
            // SAFETY: the module is alive, and the text ends with a zero.
            done(name, unsafe { (self.driver.cuModuleGetFunction)(&mut function, module, text.as_ptr()) })?;
            Ok(Kernel { function, name, waits })
        };
        names.iter().map(find).collect()
    }

    /// Lets a kernel use this much shared memory.
    pub fn allow_shared(&self, kernel: Kernel, bytes: usize) -> Result<()> {
        let which = api::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is alive.
        done(kernel.name, unsafe { (self.driver.cuFuncSetAttribute)(kernel.function, which, bytes as c_int) })
            .map_err(|e| e.help(format!("this GPU cannot give {} of shared memory", dpo_core::memory::size(bytes))))
    }

    /// Starts a kernel.
    pub fn launch(
        &self,
        kernel: Kernel,
        grid: [usize; 3],
        block: [u32; 3],
        shared: usize,
        mut args: Args,
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let ([x, y, z], [width, height, depth]) = (grid.map(|g| g as u32), block);
        let mut early = api::early_launch();
        let config = api::LaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: width,
            blockDimY: height,
            blockDimZ: depth,
            sharedMemBytes: shared as u32,
            hStream: self.stream.cast(),
            attrs: &raw mut early,
            // Kernels for cards before Hopper do not wait: such cards know no early start.
            numAttrs: u32::from(kernel.waits && self.kernels >= 90),
        };
        let mut pointers: Vec<*mut c_void> = args.slots.iter_mut().map(|s| s.0.as_mut_ptr().cast()).collect();
        // SAFETY: every pointer is to an argument, which is copied before the call returns, as are the configuration and its attribute.
        let status =
            unsafe { (self.driver.cuLaunchKernelEx)(&config, kernel.function, pointers.as_mut_ptr(), ptr::null_mut()) };
        done(kernel.name, status)
    }

    /// Milliseconds that the work takes which `body` starts.
    pub(super) fn time(&self, body: impl FnOnce() -> Result<()>) -> Result<f32> {
        let outer = self.trace.replace(Some(Trace::default()));
        self.mark("start")?;
        body()?;
        self.mark("end")?;
        let times = self.end_trace()?;
        *self.trace.borrow_mut() = outer;
        Ok(times.iter().map(|(_, t)| t).sum())
    }

    /// Starts to collect times.
    pub fn start_trace(&self) -> Result<()> {
        *self.trace.borrow_mut() = Some(Trace::default());
        self.mark("start")
    }

    /// Says that the work since the last mark was this; free where nobody collects times.
    pub fn mark(&self, label: &'static str) -> Result<()> {
        let mut trace = self.trace.borrow_mut();
        let Some(trace) = trace.as_mut() else { return Ok(()) };
        let event = new_event(self.driver, api::CU_EVENT_DEFAULT)?;
        // SAFETY: event and stream are alive.
        done("recording an event", unsafe { (self.driver.cuEventRecord)(event, self.stream) })?;
        trace.marks.push((label, event));
        Ok(())
    }

    /// Ends a trace: every piece of work with its milliseconds, in order.
    pub fn end_trace(&self) -> Result<Vec<(&'static str, f32)>> {
        self.finish()?;
        let Some(trace) = self.trace.borrow_mut().take() else { return Ok(Vec::new()) };
        let mut times = Vec::new();
        for pair in trace.marks.windows(2) {
            let mut time = 0.0;
            // SAFETY: both events were recorded and are past.
            done("reading an event", unsafe { (self.driver.cuEventElapsedTime)(&mut time, pair[0].1, pair[1].1) })?;
            times.push((pair[1].0, time));
        }
        for (_, event) in trace.marks {
            // SAFETY: nobody else has the event.
            done("freeing an event", unsafe { (self.driver.cuEventDestroy_v2)(event) })?;
        }
        Ok(times)
    }

    /// The event may serve again at once: a wait is for what it was recorded after when the wait was asked for.
    fn order(&self, before: Handle, after: Handle, event: Handle) -> Result<()> {
        // SAFETY: streams and event are alive for as long as the context.
        unsafe {
            done("recording an event", (self.driver.cuEventRecord)(event, before))?;
            done("waiting for an event", (self.driver.cuStreamWaitEvent)(after, event, api::CU_EVENT_WAIT_DEFAULT))
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated or registered by the function that belongs to it, freed once. An error here means that the context is gone, and the
        // memory with it.
        let _ = unsafe {
            match self.host {
                Some(_) => (self.driver.cuMemHostUnregister)(self.address as Handle),
                None => (self.driver.cuMemFree_v2)(self.address),
            }
        };
    }
}

impl Pinned {
    /// Its address for the device.
    pub fn address(&self) -> Address {
        self.start as Address
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this size and initialised.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed once.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `Gpu::pinned`, freed once.
        let _ = unsafe { (self.driver.cuMemFreeHost)(self.start.cast()) };
    }
}
