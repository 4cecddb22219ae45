//! A GPU as a backend of this program.

use dpo_core::backend::{Backend, Planned, Workload, agree_on_packing, whole_or_sharded};
use dpo_core::collective::ProcessGroup;
use dpo_core::console;
use dpo_core::decoder::{Decoder, Sequences};
use dpo_core::device::Device;
use dpo_core::error::{Error, Result};
use dpo_core::lora::Adapter;
use dpo_core::plan::{MemoryOptions, Packing};
use dpo_core::weights::Checkpoint;
use dpo_plugin_api::graph::ModelGraph;

use super::{CudaDecoder, CudaDevice, Gpu, GpuPlan, Nccl, Room, Source, room};

/// What the progress bar of loading weights looks like.
const BAR: &str = "weights     {bar:30} {bytes}/{total_bytes} {bytes_per_sec}";

/// The GPU of an index, in bfloat16.
pub struct Cuda(pub usize);

struct PlannedOnGpu {
    gpu: Gpu,
    nccl: Option<Nccl>,
    graph: ModelGraph,
    adapter: Adapter,
    plan: GpuPlan,
}

impl Planned for PlannedOnGpu {
    fn packing(&self) -> Packing {
        self.plan.packing()
    }

    fn adapter(&mut self) -> &mut Adapter {
        &mut self.adapter
    }

    fn load(self: Box<Self>, group: &mut dyn ProcessGroup, checkpoint: &Checkpoint) -> Result<Box<dyn Device>> {
        let PlannedOnGpu { gpu, nccl, graph, adapter, plan } = *self;
        let bar = console::bar(checkpoint.bytes() as u64, BAR);
        let source = Source::Checkpoint(checkpoint);
        let mut device = CudaDevice::load(gpu, graph, &source, adapter, (plan, group.rank()), &bar)?;
        bar.finish_and_clear();
        device.warm_up()?;
        Ok(Box::new(device.join(nccl)))
    }
}

impl Backend for Cuda {
    fn is_gpu(&self) -> bool {
        true
    }

    fn plan(
        &self,
        group: &mut dyn ProcessGroup,
        graph: ModelGraph,
        adapter: Adapter,
        workload: Workload,
        options: MemoryOptions,
    ) -> Result<Box<dyn Planned>> {
        let gpu = Gpu::open(self.0)?;
        let nccl = Nccl::join(&gpu, group)?;
        let room = room(&gpu, options.limit, nccl.as_ref())?;
        // Ranks shard the layers before they keep them in host memory, each its own copy.
        let offload_base = options.offload_base.or((group.size() > 1).then_some(false));
        let options = MemoryOptions { offload_base, ..options };
        let room = Room { host: room.host.map(|host| host / group.size()), ..room };
        let plan_for = |parts| GpuPlan::new(&graph, &adapter, workload.longest, workload.answers, room, parts, options);
        let plan = |parts: usize| match &nccl {
            None if parts > 1 => Err(plan_for(1).err().unwrap_or_else(|| {
                Error::input("GPUs share frozen weights through NCCL, which these ranks do not have")
                    .at("--shard-base")
                    .help("leave it out: the weights fit on each")
            })),
            _ => plan_for(parts),
        };
        let mut plan = whole_or_sharded(group, options.shard_base, plan, |plan| [plan.weights, plan.whole])?;
        let packing = agree_on_packing(group, plan.packing())?;
        if packing != plan.packing() {
            let options = MemoryOptions { packing: Some(packing), ..options };
            let (longest, answers) = (workload.longest, workload.answers);
            plan = GpuPlan::new(&graph, &adapter, longest, answers, room, plan.ranks, options)?;
        }
        console::line(format!("device      {}, compute capability {}\n{plan}", gpu.name, gpu.capability));
        Ok(Box::new(PlannedOnGpu { gpu, nccl, graph, adapter, plan }))
    }

    fn decoder(
        &self,
        graph: &ModelGraph,
        checkpoint: &Checkpoint,
        adapters: Vec<Adapter>,
        sequences: Sequences,
        options: MemoryOptions,
    ) -> Result<Box<dyn Decoder>> {
        let gpu = Gpu::open(self.0)?;
        let room = room(&gpu, options.limit, None)?;
        let bar = console::bar(checkpoint.bytes() as u64, BAR);
        let source = Source::Checkpoint(checkpoint);
        let decoder = CudaDecoder::load(gpu, graph.clone(), &source, adapters, sequences, (room, options), &bar)?;
        bar.finish_and_clear();
        Ok(Box::new(decoder))
    }
}
