//! A disk that fails when told to: with `LD_PRELOAD` its functions come before those of the C library, count the operations on
//! files of one folder that may change something, and let one of them fail.
//!
//! `FAILING_DISK` is the folder, `FAILING_DISK_AT` the operation that fails (from 1; none without it), `FAILING_DISK_ERRNO` its
//! error, `FAILING_DISK_LIST` a file that gets a line an operation.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Disk {
    folder: PathBuf,
    fails_at: usize,
    errno: c_int,
    list: Option<c_int>,
}

static DISK: OnceLock<Option<Disk>> = OnceLock::new();
static OPERATIONS: AtomicUsize = AtomicUsize::new(0);

fn disk() -> Option<&'static Disk> {
    let read = || {
        let number = |name: &str| std::env::var(name).ok()?.parse().ok();
        let list = std::env::var("FAILING_DISK_LIST").ok().and_then(|path| {
            let path = std::ffi::CString::new(path).ok()?;
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND | libc::O_CLOEXEC;
            // SAFETY: a path that ends in 0; `open` is none of the functions below.
            Some(unsafe { libc::open(path.as_ptr(), flags, 0o644) })
        });
        Some(Disk {
            folder: std::env::var_os("FAILING_DISK")?.into(),
            fails_at: number("FAILING_DISK_AT").unwrap_or(0),
            errno: number("FAILING_DISK_ERRNO").unwrap_or(libc::ENOSPC as usize) as c_int,
            list,
        })
    };
    DISK.get_or_init(read).as_ref()
}

/// Whether an operation on a path fails; it is counted if the path is in the folder.
fn fails(operation: &str, path: &Path) -> bool {
    let Some(disk) = disk().filter(|disk| path.starts_with(&disk.folder)) else { return false };
    let count = OPERATIONS.fetch_add(1, Ordering::SeqCst) + 1;
    let line = format!("{count} {operation} {}\n", path.display());
    if let (Some(list), Some(real)) = (disk.list, next::<Write>(c"write")) {
        // SAFETY: as many bytes as there are.
        unsafe { real(list, line.as_ptr().cast(), line.len()) };
    }
    if count == disk.fails_at {
        // SAFETY: the address is this thread's.
        unsafe { *libc::__errno_location() = disk.errno };
    }
    count == disk.fails_at
}

fn path_of(name: *const c_char) -> PathBuf {
    // SAFETY: callers of the C library's functions give a text that ends in 0.
    let name = unsafe { CStr::from_ptr(name) };
    let path = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes())).to_owned();
    std::env::current_dir().map_or(path.clone(), |here| here.join(&path))
}

fn path_of_open(file: c_int) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{file}")).unwrap_or_default()
}

/// The C library's own function.
fn next<F: Copy>(name: &CStr) -> Option<F> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: a text that ends in 0.
    let address = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    // SAFETY: F is the type of the function of this name, as the callers below say.
    (!address.is_null()).then(|| unsafe { std::mem::transmute_copy(&address) })
}

type Open = unsafe extern "C" fn(*const c_char, c_int, c_int) -> c_int;
type Write = unsafe extern "C" fn(c_int, *const c_void, usize) -> isize;
type OfFile = unsafe extern "C" fn(c_int) -> c_int;
type Truncate = unsafe extern "C" fn(c_int, i64) -> c_int;
type OfPath = unsafe extern "C" fn(*const c_char) -> c_int;
type Mkdir = unsafe extern "C" fn(*const c_char, libc::mode_t) -> c_int;
type Rename = unsafe extern "C" fn(*const c_char, *const c_char) -> c_int;

/// Defines functions of the C library: what is counted of a call, under which conditions, and the call itself.
macro_rules! functions {
    ($($name:ident: $type:ty, ($($arg:ident: $of:ty),*) -> $result:ty, $path:expr, $changes:expr;)*) => {$(
        /// As in the C library, unless it fails.
        ///
        /// # Safety
        /// As in the C library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $of),*) -> $result {
            let Some(real) = next::<$type>(const {
                match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => panic!("a name without 0"),
                }
            }) else {
                return -1;
            };
            if $changes && fails(stringify!($name), &$path) {
                return -1;
            }
            // SAFETY: the caller's.
            unsafe { real($($arg),*) }
        }
    )*};
}

functions! {
    open64: Open, (path: *const c_char, flags: c_int, mode: c_int) -> c_int, path_of(path), flags & (libc::O_WRONLY | libc::O_RDWR) != 0;
    write: Write, (file: c_int, bytes: *const c_void, count: usize) -> isize, path_of_open(file), file > 2;
    fsync: OfFile, (file: c_int) -> c_int, path_of_open(file), true;
    fdatasync: OfFile, (file: c_int) -> c_int, path_of_open(file), true;
    ftruncate64: Truncate, (file: c_int, length: i64) -> c_int, path_of_open(file), true;
    mkdir: Mkdir, (path: *const c_char, mode: libc::mode_t) -> c_int, path_of(path), true;
    unlink: OfPath, (path: *const c_char) -> c_int, path_of(path), true;
    rename: Rename, (from: *const c_char, to: *const c_char) -> c_int, path_of(to), true;
}
