//! `dpo-host train`: the processes that a run has.

use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_hub::Need;
use dpo_hub::model::{self, Model};
use dpo_plugins::Registry;
use dpo_ranks::{self as ranks, Place, Ranks};
use dpo_train::Objective;

use crate::args::DeviceArg;
use crate::args::train::TrainArgs;
use crate::backends;

/// What is told where a run's secret can be guessed.
const GUESSABLE: &str = "; on a network with strangers, set DPO_HOST_SECRET to the same random text for every rank";

/// Trains: as one of the ranks that the environment names, alone, or by launching ranks.
pub(crate) fn train(registry: &Registry, mut args: TrainArgs) -> Result<()> {
    args.refuse_unsupported()?;
    args.demo_or_given()?;
    let Some(place) = Place::from_environment()? else {
        args.note_ignored();
        if args.gpus > 1 {
            return launch(registry, &args);
        }
        let backend = backends::open(&args.device()?, None)?;
        args.note_dtype(backend.is_gpu());
        let config = args.resolve(None, backend.is_gpu())?;
        return dpo_train::train(registry, config, &mut Ranks::alone(), backend.as_ref(), 0).map(|_| ());
    };
    if place.launched {
        ranks::end_with_launcher();
    } else {
        args.note_ignored();
        if args.gpus != 1 && ![Some(place.size), place.local_size].contains(&Some(args.gpus)) {
            let (gpus, size) = (args.gpus, place.size);
            return Err(Error::input(format!("{gpus} devices, but a launcher has started {size} ranks"))
                .at("--gpus")
                .help("leave it out: each rank has one device"));
        }
    }
    let mut ranks = Ranks::join(&place, args.timeouts()?)?;
    console::line(format!("ranks       {}{}", place.size, if place.is_guessable() { GUESSABLE } else { "" }));
    let result = backends::open(&args.device()?, Some(place.local_rank)).and_then(|backend| {
        let config = args.resolve(Some(&place), backend.is_gpu())?;
        dpo_train::train(registry, config, &mut ranks, backend.as_ref(), place.attempt)
    });
    ranks.end(result).map(|_| ())
}

/// Launches ranks on this machine. What can be checked beforehand is, so that it is said once.
fn launch(registry: &Registry, args: &TrainArgs) -> Result<()> {
    let device = args.device()?;
    let backends = (0..args.gpus).map(|rank| backends::open(&device, Some(rank))).collect::<Result<Vec<_>>>()?;
    if backends.iter().all(|backend| !backend.is_gpu()) {
        let count = args.gpus;
        if device == DeviceArg::Auto {
            return Err(Error::input(format!("there is no GPU for {count} processes"))
                .at("--gpus")
                .help("see `dpo-host doctor`; with --device cpu the processes share the CPU"));
        }
        console::note(format!("--gpus {count} on the CPU: {count} processes, which share its cores and memory"));
    }
    let config = args.resolve(None, false)?;
    Objective::new(registry, &config.objective)?;
    let folder = model::locate(&config.model, Need::WeightsToCome)?;
    Model::open(registry, &folder, &config.reading)?;
    let output = dpo_train::output_of(&config.output, &config.model, &folder)?;
    let told = ["--output-dir".into(), output.clone().into(), "--add-version".into(), "false".into()];
    let ended = ranks::launch(args.gpus, &told, args.max_restarts);
    if ended.is_err() && config.output.dir.as_ref() != Some(&output) {
        // Only an empty folder is removed: one whose run was refused.
        let _ = std::fs::remove_dir(&output);
    }
    ended
}
