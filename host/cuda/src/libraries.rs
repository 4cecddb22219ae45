//! NVIDIA's libraries, found at run time: in the Python environment that this program is installed in, on the loader's path, in
//! CUDA_HOME and /usr/local/cuda*, in other Python environments. The first one that has all functions is used, through the handle it was
//! opened with. None is taken that is for a newer CUDA than the driver; beyond that they may be of different versions, since they meet in
//! the driver alone.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::api::{self, Table};
use dpo_core::error::{Error, Result};

/// A library that CUDA runs need.
pub struct Library {
    /// Its name without prefix and suffix.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Whether nothing runs on a GPU without it.
    pub needed: bool,
    /// Versions in names of files, and the first CUDA whose driver it runs with.
    versions: &'static [(&'static str, i32)],
    /// Its functions that are called. A file that lacks one is not used.
    pub functions: &'static [&'static str],
}

/// All of them. The driver is the first.
pub const LIBRARIES: &[Library] = &[
    Library { name: "cuda", purpose: "the driver", needed: true, versions: &[("1", 0)], functions: api::Driver::NAMES },
    Library {
        name: "cublasLt",
        purpose: "matrix products",
        needed: true,
        versions: &[("13", 13000), ("12", 0)],
        functions: api::CublasLt::NAMES,
    },
    Library {
        name: "nvrtc",
        purpose: "compiles kernels for the card",
        needed: true,
        versions: &[("13", 13000), ("12", 0)],
        functions: api::Nvrtc::NAMES,
    },
    Library {
        name: "nccl",
        purpose: "several GPUs",
        needed: false,
        versions: &[("2", 0)],
        functions: api::NcclTable::NAMES,
    },
];

/// The oldest driver that is supported, as the version of CUDA that it is for.
pub const OLDEST_DRIVER: i32 = 12040;

/// How to get such a driver.
pub const DRIVER_REMEDY: &str = "install NVIDIA's driver, version 550 or newer";

/// What became of the search for a library.
pub struct Found {
    /// What was looked for.
    pub library: &'static Library,
    /// The one that is used, or why none is.
    pub opened: std::result::Result<Opened, String>,
}

/// A library that is open, for as long as the process runs.
pub struct Opened {
    /// Its file.
    pub path: PathBuf,
    handle: libloading::Library,
}

/// The functions of a library.
///
/// # Errors
/// A library that is missing or lacks one, with how to get it.
pub(super) fn table<T: Table>() -> Result<&'static T> {
    if let Some(table) = T::cell().get() {
        return Ok(table);
    }
    let table = T::of(&require_one(T::LIBRARY)?.handle).map_err(|e| Error::run(e.to_string()))?;
    Ok(T::cell().get_or_init(|| table))
}

/// Finds and opens all libraries, once.
pub fn find() -> &'static [Found] {
    static FOUND: OnceLock<Vec<Found>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let (own, others) = (own_folders(), folders());
        let driver = Found { library: &LIBRARIES[0], opened: open(&LIBRARIES[0], None, &[], &others) };
        let version = driver.opened.as_ref().ok().and_then(version_of);
        let rest =
            LIBRARIES[1..].iter().map(|library| Found { library, opened: open(library, version, &own, &others) });
        let rest: Vec<Found> = rest.collect();
        std::iter::once(driver).chain(rest).collect()
    })
}

/// Version of CUDA that the driver is for, such as 12040; none without a driver.
pub fn driver_version() -> Option<i32> {
    find()[0].opened.as_ref().ok().and_then(version_of)
}

fn version_of(opened: &Opened) -> Option<i32> {
    let driver = api::Driver::of(&opened.handle).ok()?;
    let mut version = 0;
    // SAFETY: writes one number.
    let status = unsafe { (driver.cuDriverGetVersion)(&mut version) };
    (status == 0).then_some(version)
}

/// Whether a GPU could be used; the error names the first library that is missing.
pub fn require() -> Result<()> {
    LIBRARIES.iter().filter(|l| l.needed).try_for_each(|l| require_one(l.name).map(drop))
}

/// A library that is needed now.
pub fn require_one(name: &str) -> Result<&'static Opened> {
    let found = find().iter().find(|f| f.library.name == name);
    let found = found.ok_or_else(|| Error::run(format!("lib{name}.so is not among the libraries of CUDA")))?;
    found.opened.as_ref().map_err(|why| {
        Error::run(format!("lib{name}.so ({}) {why}", found.library.purpose)).help(found.library.remedy())
    })
}

impl Library {
    /// How to get it.
    pub fn remedy(&self) -> String {
        if self.name == "cuda" { DRIVER_REMEDY.into() } else { pip_install() }
    }

    fn files(&self, driver: Option<i32>) -> impl Iterator<Item = String> {
        let fitting = self.versions.iter().filter(move |(_, first)| driver.is_none_or(|version| version >= *first));
        fitting.map(|(version, _)| format!("lib{}.so.{version}", self.name))
    }
}

/// The command that brings the libraries for this driver to where they are found.
pub fn pip_install() -> String {
    let newest = driver_version().is_none_or(|v| v >= 13000);
    let packages = match (prefix().filter(|p| is_packaged(p)), newest) {
        (Some(_), true) => "'dpo-host[cuda13]'",
        (Some(_), false) => "'dpo-host[cuda12]'",
        (None, true) => "'nvidia-cublas>=13' 'nvidia-cuda-nvrtc>=13' nvidia-nccl-cu13",
        (None, false) => "nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12 nvidia-nccl-cu12",
    };
    format!("{} {packages}", pip())
}

/// The command that brings the newest NVRTC that this driver takes.
pub fn pip_upgrade_nvrtc() -> String {
    let newest = driver_version().is_none_or(|v| v >= 13000);
    format!("{} --upgrade {}", pip(), if newest { "nvidia-cuda-nvrtc" } else { "nvidia-cuda-nvrtc-cu12" })
}

/// What installs into this program's environment. Those of pipx and uv have no pip of their own, but a file by which they are known.
fn pip() -> String {
    let prefix = prefix().unwrap_or_default();
    if prefix.join("pipx_metadata.json").is_file() {
        "pipx runpip dpo-host install".into()
    } else if prefix.join("uv-receipt.toml").is_file() {
        format!("uv pip install --python {}", prefix.display())
    } else {
        "pip install".into()
    }
}

/// Whether pip has installed this program there.
fn is_packaged(prefix: &Path) -> bool {
    let is_ours = |p: &PathBuf| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("dpo_host-") && name.ends_with(".dist-info")
    };
    packages(prefix).into_iter().flat_map(entries).any(|p| is_ours(&p))
}

/// A library that has all functions: from the program's own environment, by the loader, or elsewhere.
fn open(
    library: &Library,
    driver: Option<i32>,
    own: &[PathBuf],
    others: &[PathBuf],
) -> std::result::Result<Opened, String> {
    let names: Vec<String> = library.files(driver).collect();
    let own = names.iter().flat_map(|n| own.iter().map(move |folder| folder.join(n))).filter(|f| f.is_file());
    let others = others.iter().flat_map(|f| names.iter().map(move |n| f.join(n))).filter(|f| f.is_file());
    let mut why = "is missing".to_owned();
    for file in own.chain(names.iter().map(PathBuf::from)).chain(others) {
        if library.name == "nvrtc" && file.is_absolute() {
            open_builtins(&file);
        }
        // SAFETY: NVIDIA's libraries only register themselves when they are opened.
        let Ok(handle) = (unsafe { libloading::Library::new(&file) }) else { continue };
        let path = if file.is_absolute() { file } else { mapped(&file).unwrap_or(file) };
        // SAFETY: the addresses are not used.
        let lacks = |name: &&&str| unsafe { handle.get::<*const ()>(name.as_bytes()) }.is_err();
        match library.functions.iter().find(lacks) {
            None => return Ok(Opened { path, handle }),
            Some(name) => why = format!("is too old: {} has no function {name}", path.display()),
        }
    }
    Err(why)
}

/// NVRTC opens its builtins by name, which the loader then knows.
fn open_builtins(nvrtc: &Path) {
    let beside = nvrtc.parent().map(|p| entries(p.to_owned())).unwrap_or_default();
    for file in beside.iter().filter(|p| p.to_string_lossy().contains("libnvrtc-builtins.so")) {
        // SAFETY: as for all of NVIDIA's libraries.
        if let Ok(library) = unsafe { libloading::Library::new(file) } {
            std::mem::forget(library);
        }
    }
}

/// The file of a library that the loader has found by its name.
fn mapped(name: &Path) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let files = maps.lines().filter_map(|l| l.find('/').map(|at| &l[at..]));
    let name = name.to_string_lossy().into_owned();
    files.map(PathBuf::from).find(|p| p.file_name().is_some_and(|f| f.to_string_lossy().starts_with(&name)))
}

/// What is in a folder, the last name first: newer versions before older ones.
fn entries(folder: PathBuf) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    all.sort();
    all.reverse();
    all
}

/// Where this program is installed: the folder above its `bin`.
fn prefix() -> Option<PathBuf> {
    let exe = std::env::current_exe().ok()?.canonicalize().ok()?;
    let bin = exe.parent()?;
    (bin.file_name()? == "bin").then(|| bin.parent().map(Path::to_owned))?
}

/// Folders of Python's packages in an environment.
fn packages(prefix: &Path) -> Vec<PathBuf> {
    let is_python = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python"));
    let versions = entries(prefix.join("lib")).into_iter().filter(is_python);
    versions.flat_map(|python| ["site-packages", "dist-packages"].map(|p| python.join(p))).collect()
}

/// Folders of libraries in an environment: those of NVIDIA's packages, and where conda puts them.
fn environment(prefix: &Path) -> Vec<PathBuf> {
    let nvidia = packages(prefix).into_iter().flat_map(|p| entries(p.join("nvidia")));
    nvidia.map(|p| p.join("lib")).chain([prefix.join("lib")]).collect()
}

fn own_folders() -> Vec<PathBuf> {
    prefix().map(|p| environment(&p)).unwrap_or_default()
}

/// Folders that the loader may not know.
fn folders() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let mut roots: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|n| variable(n)).collect();
    let local = entries("/usr/local".into()).into_iter();
    roots.extend(local.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("cuda"))));
    let mut folders: Vec<PathBuf> = roots.iter().flat_map(|r| ["lib64", "lib"].map(|l| r.join(l))).collect();
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|n| variable(n)).collect();
    let path = variable("PATH").unwrap_or_default();
    let python = std::env::split_paths(&path).map(|p| p.join("python3")).find(|p| p.exists());
    prefixes.extend(python.iter().filter_map(|p| Some(p.parent()?.parent()?.to_owned())));
    let resolved = python.and_then(|p| p.canonicalize().ok());
    prefixes.extend(resolved.and_then(|p| Some(p.parent()?.parent()?.to_owned())));
    prefixes.extend(["/usr".into(), "/usr/local".into()]);
    prefixes.extend(variable("HOME").map(|h| h.join(".local")));
    folders.extend(prefixes.iter().flat_map(|p| environment(p)));
    folders
}
