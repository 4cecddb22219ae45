//! `dpo-host doctor`: GPUs, driver and libraries; what is missing, and the command that gets it.

use crate::args::DeviceArg;
use crate::backends;
use clap::Args;

use dpo_core::error::{Error, Result};
use dpo_core::memory::size;
use dpo_cuda::{self as cuda, kernels, libraries};

#[derive(Args)]
pub(crate) struct DoctorOptions {
    /// Fail if this device cannot be used: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceArg::Auto)]
    device: DeviceArg,
    /// Compile every kernel for the architectures that are supported and print what the assembler says; needs no GPU
    #[arg(long)]
    kernels: bool,
}

pub(crate) fn doctor(options: &DoctorOptions) -> Result<()> {
    if options.kernels {
        return check_kernels();
    }
    for found in libraries::find() {
        let (library, name) = (found.library, format!("lib{}", found.library.name));
        match &found.opened {
            Ok(opened) => println!("{name:<12} {:<32} {}", library.purpose, opened.path.display()),
            Err(why) => println!("{name:<12} {:<32} {why}", library.purpose),
        }
    }
    if libraries::require_one("nvrtc").is_ok() {
        let (major, minor) = kernels::version()?;
        println!("nvrtc        version {major}.{minor}");
    }
    if let Some(version) = libraries::driver_version() {
        println!("driver       for CUDA {}.{}", version / 1000, version % 1000 / 10);
        if version < libraries::OLDEST_DRIVER {
            println!("             too old: {}", libraries::DRIVER_REMEDY);
        } else if libraries::find().iter().any(|f| f.opened.is_err()) {
            println!("             what is missing comes with: {}", libraries::pip_install());
        }
        let count = cuda::count().unwrap_or(0);
        for index in 0..count {
            let gpu = cuda::Gpu::open(index)?;
            let (free, all) = gpu.memory()?;
            let (free, all, capability) = (size(free), size(all), gpu.capability);
            println!("cuda:{index}       {}, compute capability {capability}, {free} of {all} free", gpu.name);
            if capability < 80 {
                println!(
                    "             too old: bf16 on the matrix units needs compute capability 80 (Ampere) or newer"
                );
            } else if let Err(e) = kernels::require_known(capability) {
                println!("             {e}");
            }
        }
        if count == 0 {
            println!("no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES");
        }
    } else {
        println!("driver       none, so nothing else is needed: {} to use an NVIDIA GPU", libraries::DRIVER_REMEDY);
    }
    match (&options.device, backends::gpu(&options.device, None)) {
        (DeviceArg::Auto | DeviceArg::Cpu, Ok(None)) => println!("training runs on the CPU"),
        (_, Ok(Some(index))) => {
            cuda::Gpu::open(index).map_err(|e| Error::run(e.to_string()))?;
            println!("training runs on cuda:{index}");
        }
        (_, Ok(None)) => {}
        (_, Err(e)) => return Err(Error::run(e.to_string())),
    }
    Ok(())
}

fn check_kernels() -> Result<()> {
    libraries::require_one("nvrtc")?;
    let (mut spilled, mut serialized) = (0, 0);
    let mut unknown = Vec::new();
    for capability in kernels::ARCHITECTURES {
        if let Err(e) = kernels::require_known(*capability) {
            println!("sm_{capability}: {e}");
            unknown.push(format!("sm_{capability}"));
            continue;
        }
        for (file, notes) in cuda::check_kernels(*capability)? {
            let spills = notes.lines().filter(|l| l.contains("spill stores") && !l.contains(" 0 bytes spill stores"));
            for line in spills {
                spilled += 1;
                println!("sm_{capability} {file}: {}", line.trim());
            }
            // Products that wait for each other take twice the time, with the same numbers: no other test would tell.
            for line in notes.lines().filter(|l| l.contains("wgmma") && l.contains("serialized")) {
                serialized += 1;
                println!("sm_{capability} {file}: {}", line.trim());
            }
        }
        println!("sm_{capability}: all kernels compile");
    }
    println!("{spilled} kernels spill registers");
    if serialized > 0 {
        return Err(Error::run(format!("the assembler serialized wgmma in {serialized} kernels")));
    }
    if !unknown.is_empty() {
        return Err(Error::run(format!("not compiled for {}", unknown.join(", "))).help(libraries::pip_upgrade_nvrtc()));
    }
    Ok(())
}
