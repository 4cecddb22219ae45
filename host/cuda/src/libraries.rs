//! CUDA's libraries, found at run time: on the loader's path, in CUDA_HOME, /usr/local/cuda*, or in the packages that pip and
//! conda install. One that is found elsewhere is opened by its full path; later opens by its name then find it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use dpo_core::error::{Error, Result};

/// A library that CUDA runs need.
pub struct Library {
    /// Its name without prefix and suffix.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// How to get it.
    pub remedy: &'static str,
    /// Whether nothing runs on a GPU without it.
    pub needed: bool,
    /// Versions in names of files.
    versions: &'static [&'static str],
}

/// All of them.
pub const LIBRARIES: &[Library] = &[
    Library {
        name: "cuda",
        purpose: "the driver",
        remedy: "install NVIDIA's driver, version 550 or newer",
        needed: true,
        versions: &["1"],
    },
    Library {
        name: "cublasLt",
        purpose: "matrix products",
        remedy: "pip install nvidia-cublas-cu12",
        needed: true,
        versions: &["13", "12"],
    },
    Library {
        name: "nvrtc",
        purpose: "compiles kernels for the card",
        remedy: "pip install nvidia-cuda-nvrtc-cu12",
        needed: true,
        versions: &["13", "12"],
    },
    Library {
        name: "nccl",
        purpose: "several GPUs",
        remedy: "pip install nvidia-nccl-cu12",
        needed: false,
        versions: &["2"],
    },
];

/// What became of the search for a library.
pub struct Found {
    /// What was looked for.
    pub library: &'static Library,
    /// Its file; `None` where there is none.
    pub path: Option<PathBuf>,
}

/// Finds and opens all libraries, once.
pub fn find() -> &'static [Found] {
    static FOUND: OnceLock<Vec<Found>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let folders = folders();
        LIBRARIES.iter().map(|library| Found { library, path: open(library, &folders) }).collect()
    })
}

/// Whether a GPU could be used; the error names the first library that is missing.
pub fn require() -> Result<()> {
    LIBRARIES.iter().filter(|l| l.needed).try_for_each(|l| require_one(l.name))
}

/// Whether a library was found.
pub fn require_one(name: &str) -> Result<()> {
    match find().iter().find(|f| f.library.name == name && f.path.is_none()) {
        None => Ok(()),
        Some(missing) => {
            let Library { name, purpose, remedy, .. } = missing.library;
            Err(Error::run(format!("lib{name}.so ({purpose}) is missing")).help((*remedy).to_owned()))
        }
    }
}

fn open(library: &Library, folders: &[PathBuf]) -> Option<PathBuf> {
    let names = || {
        let versioned = library.versions.iter().map(|v| format!("lib{}.so.{v}", library.name));
        versioned.chain([format!("lib{}.so", library.name)])
    };
    if names().any(|n| load(Path::new(&n))) {
        return mapped(library.name).or_else(|| Some(PathBuf::from(names().next()?)));
    }
    let files = folders.iter().flat_map(|f| names().map(move |n| f.join(n)));
    files.filter(|f| f.is_file()).find(|file| {
        // NVRTC opens its builtins by name.
        if library.name == "nvrtc" {
            let beside = file.parent().and_then(|p| std::fs::read_dir(p).ok()).into_iter().flatten().flatten();
            let builtins = beside.map(|e| e.path()).filter(|p| p.to_string_lossy().contains("libnvrtc-builtins.so"));
            builtins.for_each(|b| {
                load(&b);
            });
        }
        load(file)
    })
}

/// Opens a library for as long as the process runs.
fn load(path: &Path) -> bool {
    // SAFETY: NVIDIA's libraries only register themselves when they are opened.
    match unsafe { libloading::Library::new(path) } {
        Ok(library) => {
            std::mem::forget(library);
            true
        }
        Err(_) => false,
    }
}

/// The file of a library that is open.
fn mapped(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let file = maps.lines().filter_map(|l| l.find('/').map(|at| &l[at..]));
    file.map(PathBuf::from)
        .find(|p| p.file_name().is_some_and(|f| f.to_string_lossy().starts_with(&format!("lib{name}.so"))))
}

/// Folders that the loader may not know.
fn folders() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let entries = |folder: PathBuf| {
        let mut all: Vec<PathBuf> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
        all.sort();
        all.reverse();
        all
    };
    let mut roots: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|n| variable(n)).collect();
    let local = entries("/usr/local".into()).into_iter();
    roots.extend(local.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("cuda"))));
    let mut folders: Vec<PathBuf> =
        roots.iter().flat_map(|r| ["lib64", "lib", "targets/x86_64-linux/lib"].map(|l| r.join(l))).collect();
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|n| variable(n)).collect();
    let path = variable("PATH").unwrap_or_default();
    let python = std::env::split_paths(&path).map(|p| p.join("python3")).find(|p| p.exists());
    prefixes.extend(python.iter().filter_map(|p| Some(p.parent()?.parent()?.to_owned())));
    let resolved = python.and_then(|p| p.canonicalize().ok());
    prefixes.extend(resolved.and_then(|p| Some(p.parent()?.parent()?.to_owned())));
    prefixes.extend(["/usr".into(), "/usr/local".into()]);
    prefixes.extend(variable("HOME").map(|h| h.join(".local")));
    for prefix in prefixes {
        folders.push(prefix.join("lib"));
        let versions = entries(prefix.join("lib")).into_iter();
        for python in versions.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python"))) {
            for packages in ["site-packages", "dist-packages"] {
                folders.extend(entries(python.join(packages).join("nvidia")).into_iter().map(|p| p.join("lib")));
            }
        }
    }
    folders
}
