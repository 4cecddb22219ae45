//! NVIDIA's libraries, as `doctor` finds them: stand-ins made here, beside a copy of the program as pip would install it.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dpo_cuda::libraries::{LIBRARIES, Library};

/// Where pip puts the packages of an environment.
const PACKAGES: &str = "lib/python3.11/site-packages";

/// An environment with the program in it, and a folder of the loader's path with a driver in it.
struct Machine {
    folder: tempfile::TempDir,
}

fn library(name: &str) -> &'static Library {
    LIBRARIES.iter().find(|l| l.name == name).unwrap()
}

impl Machine {
    /// A driver for a version of CUDA; 0 for none.
    fn new(driver: i32) -> Machine {
        let machine = Machine { folder: tempfile::tempdir().unwrap() };
        fs::create_dir_all(machine.path("env/bin")).unwrap();
        fs::create_dir(machine.path("loader")).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_dpo-host-test"), machine.path("env/bin/dpo-host")).unwrap();
        if driver > 0 {
            let version = format!("int cuDriverGetVersion(int *to) {{ *to = {driver}; return 0; }}");
            machine.make("cuda", "loader/libcuda.so.1", &version, &[]);
        }
        machine
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    /// A library whose functions fail, but for these and those that it lacks.
    fn make(&self, name: &str, path: &str, own: &str, lacks: &[&str]) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let others = library(name).functions.iter().filter(|f| !own.contains(*f) && !lacks.contains(*f));
        let others: String = others.map(|f| format!("int {f}(void) {{ return 100; }}\n")).collect();
        let source = self.path("library.c");
        fs::write(&source, others + own).unwrap();
        let built = Command::new("cc").args(["-shared", "-fPIC", "-w", "-o"]).arg(&path).arg(&source).status().unwrap();
        assert!(built.success());
    }

    /// What pip installs for a version of CUDA.
    fn install(&self, version: &str) {
        let folder = |package: &str| {
            let shared = if version == "13" { "cu13" } else { package };
            format!("env/{PACKAGES}/nvidia/{shared}/lib")
        };
        self.make("cublasLt", &format!("{}/libcublasLt.so.{version}", folder("cublas")), "", &[]);
        let compiler =
            format!("int nvrtcVersion(int *major, int *minor) {{ *major = {version}; *minor = 4; return 0; }}");
        self.make("nvrtc", &format!("{}/libnvrtc.so.{version}", folder("cuda_nvrtc")), &compiler, &[]);
        self.make("nccl", &format!("env/{PACKAGES}/nvidia/nccl/lib/libnccl.so.2"), "", &[]);
    }

    /// Says that pip has installed the program here.
    fn packaged(&self) {
        fs::create_dir_all(self.path(&format!("env/{PACKAGES}/dpo_host-0.1.0.dist-info"))).unwrap();
    }

    fn doctor(&self) -> String {
        self.doctor_of(&self.path("env/bin/dpo-host"))
    }

    fn doctor_of(&self, program: &Path) -> String {
        let mut command = Command::new(program);
        command.arg("doctor").env_clear().env("PATH", "/nowhere").env("LD_LIBRARY_PATH", self.path("loader"));
        let output = command.env("XDG_CACHE_HOME", self.path("cache")).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{text}");
        text
    }
}

/// The line of a library.
fn line<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines().find(|l| l.starts_with(&format!("lib{name} "))).unwrap_or_else(|| panic!("{text}"))
}

#[test]
fn the_environment_comes_before_the_loader() {
    let machine = Machine::new(13000);
    machine.install("13");
    machine.make("cublasLt", "loader/libcublasLt.so.13", "", &[]);
    machine.make("cublasLt", "loader/libcublasLt.so", "", &[]);
    let link = machine.path("bin-of-pipx");
    std::os::unix::fs::symlink(machine.path("env/bin/dpo-host"), &link).unwrap();
    for program in [machine.path("env/bin/dpo-host"), link] {
        let text = machine.doctor_of(&program);
        assert!(line(&text, "cublasLt").contains("site-packages/nvidia/cu13/lib/libcublasLt.so.13"), "{text}");
        assert!(line(&text, "nccl").contains("site-packages/nvidia/nccl/lib/libnccl.so.2"), "{text}");
        assert!(text.contains("nvrtc        version 13.4") && !text.contains("pip install"), "{text}");
    }
}

#[test]
fn libraries_for_a_newer_cuda_than_the_drivers_are_not_taken() {
    let machine = Machine::new(12040);
    machine.install("13");
    let text = machine.doctor();
    assert!(text.contains("for CUDA 12.4") && line(&text, "cublasLt").contains("is missing"), "{text}");
    machine.install("12");
    let text = machine.doctor();
    assert!(line(&text, "cublasLt").contains("nvidia/cublas/lib/libcublasLt.so.12"), "{text}");
    assert!(text.contains("nvrtc        version 12.4"), "{text}");
}

#[test]
fn a_library_that_lacks_a_function_is_passed_over() {
    let machine = Machine::new(12040);
    let lacks = "cublasLtMatmulAlgoCheck";
    machine.make("cublasLt", "loader/libcublasLt.so.12", "", &[lacks]);
    let text = machine.doctor();
    let said = line(&text, "cublasLt");
    assert!(said.contains("is too old") && said.contains(lacks) && said.contains("loader/libcublasLt.so.12"), "{text}");
    machine.install("12");
    assert!(line(&machine.doctor(), "cublasLt").contains("site-packages"));
}

#[test]
fn one_command_suits_the_driver() {
    let command = |driver: i32, packaged: bool, marker: Option<&str>| {
        let machine = Machine::new(driver);
        if packaged {
            machine.packaged();
        }
        marker.iter().for_each(|m| fs::write(machine.path("env").join(m), "").unwrap());
        let text = machine.doctor();
        text.lines().find_map(|l| l.split_once("comes with: ")).map(|(_, c)| c.to_owned()).ok_or(text)
    };
    let cases: [(i32, bool, Option<&str>, &str); 5] = [
        (13000, true, None, "pip install 'dpo-host[cuda13]'"),
        (12080, true, None, "pip install 'dpo-host[cuda12]'"),
        (12040, false, None, "pip install nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12 nvidia-nccl-cu12"),
        (13010, false, None, "pip install 'nvidia-cublas>=13' 'nvidia-cuda-nvrtc>=13' nvidia-nccl-cu13"),
        (13000, true, Some("pipx_metadata.json"), "pipx runpip dpo-host install 'dpo-host[cuda13]'"),
    ];
    for (driver, packaged, marker, expected) in cases {
        assert_eq!(command(driver, packaged, marker).as_deref(), Ok(expected));
    }
    let old = command(12020, true, None).unwrap_err();
    assert!(old.contains("too old: install NVIDIA's driver, version 550 or newer"), "{old}");
    let none = command(0, true, None).unwrap_err();
    assert!(none.contains("driver       none") && !none.contains("pip install"), "{none}");
}
