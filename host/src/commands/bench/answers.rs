//! Speed of answers: sequences that go on together by a token each, as `serve` has them.

use std::time::Instant;

use indicatif::ProgressBar;
use serde_json::json;

use super::{BenchOptions, report};
use crate::backends;
use dpo_core::decoder::{CHUNK, Decoder, Sequences};
use dpo_core::error::{Error, Result};
use dpo_core::lora::{Adapter, AdapterConfig};
use dpo_core::memory::size;
use dpo_core::plan::MemoryOptions;
use dpo_cuda::{self as cuda, CudaDecoder, Gpu, Source};
use dpo_plugins::Registry;
use dpo_plugins::shapes::Shape;

/// Tokens of every prompt, tokens of every answer before the measured ones, and those.
const PROMPT: usize = 2 * CHUNK;
const BEFORE: usize = 4;
const MEASURED: usize = 64;

/// Measures each number of sequences.
pub(super) fn measure(registry: &Registry, options: &BenchOptions) -> Result<()> {
    let Some(index) = backends::gpu(&options.device, None)? else {
        return Err(Error::input("bench measures GPUs").at("--device").help("say --device cuda"));
    };
    let shape = Shape::named(&options.shape)?;
    let graph = shape.graph_with(registry, 0.0)?;
    let adapter = Adapter::new(&graph, AdapterConfig::new(options.lora_rank, 32.0), 0)?;
    let gpu = Gpu::open(index)?.with_kernels(options.kernels.map(|k| k.0))?;
    let memory = options.gpu_memory.as_ref().map(|size| size.bytes);
    let memory_options = MemoryOptions { limit: memory, ..MemoryOptions::default() };
    let memory_options = shape.memory(options.storage.on(memory_options), &graph)?;
    let room = cuda::room(&gpu, memory, None)?;
    let (vocab, name) = (graph.vocab_size as u32, gpu.name.clone());
    let tokens = PROMPT + BEFORE + MEASURED + 1;
    let wanted = Sequences { count: options.sequences.iter().copied().max().unwrap_or(1), most: tokens, least: tokens };
    let (source, hidden) = (Source::Random, ProgressBar::hidden());
    let mut decoder = CudaDecoder::load(gpu, graph, &source, vec![adapter], wanted, (room, memory_options), &hidden)?;
    let ids = |count: usize, seed: usize| (0..count).map(|i| (i * 31 + seed * 7) as u32 % vocab).collect::<Vec<u32>>();
    if !options.json {
        let (free, all) = decoder.gpu().memory()?;
        println!(
            "device      {name}, {} in use; prompts of {PROMPT} tokens, an adapter of rank {}",
            size(all - free),
            options.lora_rank
        );
        println!("{:>9} {:>14} {:>16} {:>14}", "SEQUENCES", "PROMPT TOK/S", "MS A TOKEN", "TOKENS/S");
    }
    for count in &options.sequences {
        let prompts: Vec<Vec<u32>> = (0..*count).map(|at| ids(PROMPT, at)).collect();
        let start = Instant::now();
        for (at, prompt) in prompts.iter().enumerate() {
            decoder.truncate(at, 0);
            prompt.chunks(CHUNK).try_for_each(|part| decoder.append(Some(0), &[(at, part)]).map(drop))?;
        }
        let reading = (count * PROMPT) as f64 / start.elapsed().as_secs_f64();
        let last = ids(*count, 3);
        let new: Vec<(usize, &[u32])> = last.chunks(1).enumerate().collect();
        (0..BEFORE).try_for_each(|_| decoder.append(Some(0), &new).map(drop))?;
        let start = Instant::now();
        (0..MEASURED).try_for_each(|_| decoder.append(Some(0), &new).map(drop))?;
        let seconds = start.elapsed().as_secs_f64() / MEASURED as f64;
        let speed = *count as f64 / seconds;
        if options.json {
            println!(
                "{}",
                json!({"shape": options.shape, "gpu": name, "sequences": count, "prompt_tokens_per_second": reading,
                    "milliseconds": seconds * 1e3, "tokens_per_second": speed})
            );
        } else {
            println!("{count:>9} {reading:>14.0} {:>16.2} {speed:>14.1}", seconds * 1e3);
        }
        if options.profile_ops || options.trace.is_some() {
            decoder.gpu().start_trace()?;
            decoder.append(Some(0), &new)?;
            report(&decoder.gpu().end_trace()?, options)?;
        }
    }
    Ok(())
}
