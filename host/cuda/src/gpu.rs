//! One GPU: its context, its stream, its memory, launches and their times.
//!
//! This, `blas.rs`, `kernels.rs` and `nccl.rs` are the only places that call CUDA. Addresses on the device are plain numbers: a wrong one is an
//! error of the device, which ends the run, and never touches memory of this process.

use std::cell::RefCell;
use std::ffi::{CString, c_void};
use std::ptr;

use cudarc::driver::{result, sys};

use dpo_core::error::{Error, Result};
use dpo_core::progress;

/// An address on the device, or in host memory that the device can read.
pub(super) type Address = u64;

/// A GPU with one stream, on which everything runs in order.
pub struct Gpu {
    /// What the driver calls it.
    pub name: String,
    /// Compute capability, such as 90.
    pub capability: u32,
    /// The same for a card wherever it is seen from.
    pub uuid: [u8; 16],
    stream: sys::CUstream,
    /// Times of labelled work, where somebody asked for them.
    trace: RefCell<Option<Trace>>,
}

/// Events between labelled pieces of work.
#[derive(Default)]
struct Trace {
    marks: Vec<(&'static str, sys::CUevent)>,
}

/// A compiled kernel.
#[derive(Clone, Copy)]
pub struct Kernel {
    function: sys::CUfunction,
    name: &'static str,
}

/// Memory of the device, freed when dropped.
pub struct Memory {
    pub address: Address,
    pub bytes: usize,
}

/// Host memory that the device reads and writes directly.
pub struct Pinned {
    start: *mut u8,
    bytes: usize,
}

/// A second stream, for work beside that of the main one.
pub(super) struct SideStream {
    pub(super) stream: sys::CUstream,
    event: sys::CUevent,
}

/// Arguments of a kernel, laid out one after the other.
#[derive(Default)]
pub struct Args {
    /// Every argument at an aligned place.
    words: Vec<[u64; 8]>,
}

/// A value that a kernel takes as an argument, as its bytes.
///
/// # Safety
/// The type has no padding that matters to the kernel and is at most 64 bytes long.
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

impl View {
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
        let mut word = [0_u64; 8];
        // SAFETY: an `Argument` has at most 64 bytes, which is what `word` holds.
        unsafe { ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), word.as_mut_ptr().cast(), size_of::<T>()) };
        self.words.push(word);
        self
    }
}

fn failed(what: &str) -> impl FnOnce(result::DriverError) -> Error + '_ {
    move |e| {
        let text = e.error_string().map_or_else(|_| format!("{e:?}"), |t| t.to_string_lossy().into_owned());
        Error::run(format!("CUDA: {what}: {text}"))
    }
}

/// How many GPUs the driver shows. The libraries have been found before.
pub fn count() -> Result<usize> {
    result::init().map_err(failed("starting the driver"))?;
    Ok(result::device::get_count().map_err(failed("counting GPUs"))? as usize)
}

/// Version of CUDA that the driver is for, such as 12040.
pub fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed("asking for the driver's version"))?;
    Ok(version)
}

impl Gpu {
    /// Opens the GPU of an index.
    pub fn open(index: usize) -> Result<Gpu> {
        let count = count()?;
        if index >= count {
            return Err(Error::input(format!("there is no GPU {index}: the driver shows {count}")).at("--device"));
        }
        let device = result::device::get(index as i32).map_err(failed("opening the GPU"))?;
        let name = result::device::get_name(device).map_err(failed("asking for the GPU's name"))?;
        let attribute = |which| {
            // SAFETY: the device was opened above.
            unsafe { result::device::get_attribute(device, which) }.map_err(failed("asking what the GPU can do"))
        };
        let uuid = result::device::get_uuid(device).map_err(failed("asking for the GPU's id"))?;
        let uuid = uuid.bytes.map(|b| b as u8);
        use sys::CUdevice_attribute_enum as Ask;
        let major = attribute(Ask::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Ask::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        // SAFETY: the device was opened above; its context stays for as long as the process.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("opening the GPU"))?;
        // SAFETY: the context is alive.
        unsafe { result::ctx::set_current(context) }.map_err(failed("opening the GPU"))?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("opening a stream"))?;
        Ok(Gpu { name, capability: (major * 10 + minor) as u32, uuid, stream, trace: RefCell::new(None) })
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// A further stream.
    pub(super) fn side_stream(&self) -> Result<SideStream> {
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("opening a stream"))?;
        let event =
            result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed("making an event"))?;
        Ok(SideStream { stream, event })
    }

    /// Lets what is started from now on in a side stream wait for everything that was started in the main one.
    pub(super) fn wait_for_main(&self, side: &SideStream) -> Result<()> {
        order(self.stream, side.stream, side.event)
    }

    /// Lets what is started from now on in the main stream wait for everything in a side stream.
    pub(super) fn wait_for_side(&self, side: &SideStream) -> Result<()> {
        order(side.stream, self.stream, side.event)
    }

    /// Copies bytes on the device.
    pub(super) fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        // SAFETY: two addresses of the device.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.map_err(failed("copying on the GPU"))
    }

    /// Free and all bytes of the GPU.
    pub fn memory(&self) -> Result<(usize, usize)> {
        result::mem_get_info().map_err(failed("asking for free memory"))
    }

    /// Memory on the device.
    pub fn allocate(&self, bytes: usize) -> Result<Memory> {
        // SAFETY: the context is current; the memory is written before it is read.
        let address = unsafe { result::malloc_sync(bytes.max(256)) }.map_err(|e| {
            failed("allocating memory")(e).help(format!("{} were asked for", dpo_core::memory::size(bytes)))
        })?;
        Ok(Memory { address, bytes })
    }

    /// Host memory that the device can read.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned> {
        // SAFETY: the context is current.
        let start = unsafe { result::malloc_host(bytes.max(256), 0) }.map_err(failed("allocating pinned memory"))?;
        // SAFETY: the memory was just allocated with this size.
        unsafe { ptr::write_bytes(start.cast::<u8>(), 0, bytes.max(256)) };
        Ok(Pinned { start: start.cast(), bytes })
    }

    /// Copies bytes of pinned memory to the device, `rows` of `row` bytes that lie `pitch` apart there.
    pub fn upload_rows(&self, from: &[u8], to: Address, row: usize, rows: usize, pitch: usize) -> Result<()> {
        if from.len() < row * rows {
            return Err(Error::run("an upload is longer than its source"));
        }
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype_enum::CU_MEMORYTYPE_HOST,
            srcHost: from.as_ptr().cast(),
            srcDevice: 0,
            srcArray: ptr::null_mut(),
            srcPitch: row,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: to,
            dstArray: ptr::null_mut(),
            dstPitch: pitch,
            WidthInBytes: row,
            Height: rows,
        };
        // SAFETY: the source is as long as was checked; callers keep it until `finish`.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream) }.result().map_err(failed("copying to the GPU"))
    }

    /// Copies to the device.
    pub fn upload<T: Copy>(&self, from: &[T], to: Address) -> Result<()> {
        // SAFETY: plain numbers, read until the copy is done: pageable memory is staged before the call returns, and
        // pinned memory is kept until `finish`.
        unsafe { result::memcpy_htod_async(to, from, self.stream) }.map_err(failed("copying to the GPU"))
    }

    /// Copies from the device and waits for it.
    pub fn download<T: Copy>(&self, from: Address, to: &mut [T]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: `to` outlives the copy, which is waited for.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream) }.map_err(failed("copying from the GPU"))?;
        self.finish()
    }

    /// Sets bytes to zero.
    pub fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        // SAFETY: an address of the device.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }.map_err(failed("clearing memory"))
    }

    /// Waits for everything that was started.
    pub fn finish(&self) -> Result<()> {
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("running"))?;
        progress::advance();
        Ok(())
    }

    /// Kernels of a compiled module, by name.
    pub fn load(&self, image: &[u8], names: &[&'static str]) -> Result<Vec<Kernel>> {
        // SAFETY: the image is a whole cubin, as NVRTC made it. Modules are never unloaded.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(failed("loading kernels"))?;
        let find = |name: &&'static str| {
            let text = CString::new(*name).map_err(|_| Error::run("a kernel's name has a zero"))?;
            // SAFETY: the module is alive.
            let function = unsafe { result::module::get_function(module, text) }.map_err(failed(name))?;
            Ok(Kernel { function, name })
        };
        names.iter().map(find).collect()
    }

    /// Lets a kernel use this much shared memory.
    pub fn allow_shared(&self, kernel: Kernel, bytes: usize) -> Result<()> {
        let which = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is alive.
        unsafe { result::function::set_function_attribute(kernel.function, which, bytes as i32) }.map_err(|e| {
            failed(kernel.name)(e)
                .help(format!("this GPU cannot give {} of shared memory", dpo_core::memory::size(bytes)))
        })
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
        let grid = grid.map(|g| g as u32);
        let mut pointers: Vec<*mut c_void> = args.words.iter_mut().map(|w| w.as_mut_ptr().cast()).collect();
        // SAFETY: every pointer is to an argument, which is copied before the call returns.
        unsafe {
            result::launch_kernel(
                kernel.function,
                (grid[0], grid[1], grid[2]),
                (block[0], block[1], block[2]),
                shared as u32,
                self.stream,
                &mut pointers,
            )
        }
        .map_err(failed(kernel.name))
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
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("making an event"))?;
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(event, self.stream) }.map_err(failed("recording an event"))?;
        trace.marks.push((label, event));
        Ok(())
    }

    /// Ends a trace: every piece of work with its milliseconds, in order.
    pub fn end_trace(&self) -> Result<Vec<(&'static str, f32)>> {
        self.finish()?;
        let Some(trace) = self.trace.borrow_mut().take() else { return Ok(Vec::new()) };
        let mut times = Vec::new();
        for pair in trace.marks.windows(2) {
            // SAFETY: both events were recorded and are past.
            let time = unsafe { result::event::elapsed(pair[0].1, pair[1].1) }.map_err(failed("reading an event"))?;
            times.push((pair[1].0, time));
        }
        for (_, event) in trace.marks {
            // SAFETY: nobody else has the event.
            unsafe { result::event::destroy(event) }.map_err(failed("freeing an event"))?;
        }
        Ok(times)
    }
}

/// The event may serve again at once: a wait is for what it was recorded after when the wait was asked for.
fn order(before: sys::CUstream, after: sys::CUstream, event: sys::CUevent) -> Result<()> {
    // SAFETY: streams and event are alive for as long as the context.
    unsafe {
        result::event::record(event, before).map_err(failed("recording an event"))?;
        result::stream::wait_event(after, event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT)
            .map_err(failed("waiting for an event"))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by `Gpu::allocate`, freed once. An error here means that the context is gone, and the memory with it.
        let _ = unsafe { result::free_sync(self.address) };
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
        let _ = unsafe { result::free_host(self.start.cast()) };
    }
}
