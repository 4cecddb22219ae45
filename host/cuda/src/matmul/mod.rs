//! Matmuls: cuBLASLt's, and kernels of our own, which take more than it does into their ends. Which of them computes a class of shapes is
//! timed once on a kind of GPU and kept on disk, so that later runs, and the same run again, compute the same bits.

mod gemm;
mod library;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Display};
use std::fs::File;

use serde::{Deserialize, Serialize};

pub(crate) use gemm::{Gated, Gemm};
pub(super) use gemm::{SOURCE, computes_gates};
pub(super) use library::WORKSPACE;

use super::api;
use super::gpu::{Address, Gpu, View};
use super::kernels::Kernels;
use dpo_core::cache;
use dpo_core::error::{Error, Result};
use library::{Library, Plan};

/// All matmuls of one GPU.
pub(super) struct Matmuls {
    library: Library,
    plans: RefCell<HashMap<Matmul, (Plan, Algorithm)>>,
    /// Algorithms by [`Matmul::class`].
    tuned: RefCell<BTreeMap<String, Algorithm>>,
    /// Whether algorithms are timed: results are then of no use.
    tuning: Cell<bool>,
    /// Of the cache's entry: the card and the library.
    name: String,
}

/// What computes a matmul.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Algorithm {
    CublasLt(api::Algorithm),
    Gemm,
}

/// Rows of a class of shapes are a multiple of this.
pub(super) const CLASS: usize = 512;

/// `D = op(A) · op(B) + beta · C (+ bias)`, all in rows: `[m, k] · [k, n]`, in bf16 with sums in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Matmul {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Whether A lies as `[k, m]`.
    pub a_transposed: bool,
    /// Whether B lies as `[n, k]`.
    pub b_transposed: bool,
    /// Whether D (and C) are f32.
    pub wide: bool,
    /// Whether C is added.
    pub add: bool,
    /// Whether a bias `[n]` is added to every row.
    pub bias: bool,
    /// Distances of rows of A, B, C, D.
    lds: [i64; 4],
    /// Alignment in bytes of A, B, C, D, up to 256.
    alignments: [u32; 4],
}

/// Matrices of a matmul. `c` is read where something is added; it may be `d`.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub a: View,
    pub b: View,
    pub c: View,
    pub d: View,
    pub bias: Address,
}

impl Display for Matmul {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "matmul of [{}, {}] and [{}, {}]", self.m, self.k, self.k, self.n)
    }
}

/// Algorithms that were found before. What cannot be read is timed again.
fn read(name: &str) -> BTreeMap<String, Algorithm> {
    cache::read(CACHE, name).and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Where algorithms are cached.
const CACHE: &str = "products";

/// By how much cuBLASLt's best has to be faster than a kernel of our own to be taken: times spread about as much, and ours fit their
/// tiles to the rows at hand, of which a class has many.
const MARGIN: f32 = 0.98;

impl Matmuls {
    pub(super) fn new(gpu: &Gpu) -> Result<Matmuls> {
        let library = Library::new(gpu)?;
        let name = format!("{}-cublas-{}-gemm-{}", gpu.name.replace(' ', "-"), library.version(), gemm::version());
        Ok(Matmuls {
            library,
            plans: RefCell::default(),
            tuned: RefCell::new(read(&name)),
            tuning: Cell::new(false),
            name,
        })
    }

    /// Runs `body`, in which algorithms are timed for classes that have none; then keeps them on disk. Matmuls in `body` leave
    /// anything in their outputs. One process of a machine does so at a time, so that the others, and the next run, use what it
    /// found: other algorithms round otherwise.
    pub(super) fn tune(&self, body: impl FnOnce() -> Result<()>) -> Result<()> {
        let _lock = self.lock();
        for (class, algorithm) in read(&self.name) {
            self.tuned.borrow_mut().entry(class).or_insert(algorithm);
        }
        let before = self.tuned.borrow().len();
        self.tuning.set(true);
        let outcome = body();
        self.tuning.set(false);
        self.forget()?;
        outcome?;
        if self.tuned.borrow().len() > before {
            let text = serde_json::to_vec(&*self.tuned.borrow()).map_err(|e| Error::run(e.to_string()))?;
            // A cache that cannot be written costs seconds in the next run, not this run.
            let _ = cache::write(CACHE, &self.name, &text);
        }
        Ok(())
    }

    /// Held by the process that tunes. Where files cannot be locked, none.
    fn lock(&self) -> Option<File> {
        let path = cache::folder(CACHE).ok()?.join(format!("{}.lock", self.name));
        let lock = File::options().create(true).truncate(false).write(true).open(path).ok()?;
        lock.lock().ok().map(|()| lock)
    }

    /// Drops plans, which were made for shapes that will not come again.
    fn forget(&self) -> Result<()> {
        for (matmul, (plan, _)) in self.plans.borrow_mut().drain() {
            self.library.destroy(&matmul, plan)?;
        }
        Ok(())
    }

    /// Starts a matmul.
    pub(super) fn run(&self, gpu: &Gpu, kernels: &Kernels, mut matmul: Matmul, on: Operands) -> Result<()> {
        if matmul.m == 0 || matmul.n == 0 {
            return Ok(());
        }
        let of = [on.a, on.b, on.c, on.d];
        matmul.lds = of.map(|v| v.ld);
        matmul.alignments = of.map(|v| 1 << v.at.trailing_zeros().min(8));
        let mut plans = self.plans.borrow_mut();
        let (plan, algorithm) = match plans.entry(matmul) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => new.insert(self.plan(gpu, kernels, &matmul, on)?),
        };
        self.start(gpu, kernels, (&matmul, plan), *algorithm, on)
    }

    fn start(
        &self,
        gpu: &Gpu,
        kernels: &Kernels,
        (matmul, plan): (&Matmul, &Plan),
        algorithm: Algorithm,
        on: Operands,
    ) -> Result<()> {
        match algorithm {
            Algorithm::CublasLt(algorithm) => self.library.start(gpu, matmul, plan, &algorithm, on),
            Algorithm::Gemm => Gemm::of(matmul).launch(gpu, kernels, [matmul.m, matmul.n, matmul.k], on),
        }
    }

    fn plan(&self, gpu: &Gpu, kernels: &Kernels, matmul: &Matmul, on: Operands) -> Result<(Plan, Algorithm)> {
        let plan = self.library.plan(matmul)?;
        let known = self.tuned.borrow().get(&matmul.class()).copied();
        let own = matmul.is_gemm() && Gemm::of(matmul).is_loaded(gpu, kernels);
        let fits = |algorithm: &Algorithm| match algorithm {
            Algorithm::CublasLt(algorithm) => self.library.fits(&plan, algorithm),
            Algorithm::Gemm => own,
        };
        if let Some(algorithm) = known.filter(fits) {
            return Ok((plan, algorithm));
        }
        let found = self.library.candidates(matmul, &plan, if self.tuning.get() { CANDIDATES } else { 1 })?;
        let mut candidates: Vec<Algorithm> = found.into_iter().map(Algorithm::CublasLt).collect();
        if !self.tuning.get() {
            return Ok((plan, candidates[0]));
        }
        candidates.extend(own.then_some(Algorithm::Gemm));
        let fastest = self.fastest(gpu, kernels, (matmul, &plan), &candidates, on)?;
        self.tuned.borrow_mut().insert(matmul.class(), fastest);
        Ok((plan, fastest))
    }

    /// The fastest of some algorithms, of which the first is cuBLASLt's choice; by the median of three runs after one.
    fn fastest(
        &self,
        gpu: &Gpu,
        kernels: &Kernels,
        matmul: (&Matmul, &Plan),
        candidates: &[Algorithm],
        on: Operands,
    ) -> Result<Algorithm> {
        let mut times = Vec::new();
        for algorithm in candidates {
            let start = || self.start(gpu, kernels, matmul, *algorithm, on);
            start()?;
            let mut runs = [0.0_f32; 3];
            for run in &mut runs {
                *run = gpu.time(start)?;
            }
            runs.sort_by(f32::total_cmp);
            times.push((runs[1], *algorithm));
        }
        let own = times.pop_if(|(_, algorithm)| matches!(algorithm, Algorithm::Gemm));
        let first = times[0];
        let best = times.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or(first);
        // Within its spread a time says nothing: then cuBLASLt's ranking stays.
        let library = if best.0 < first.0 * MARGIN { best } else { first };
        Ok(own.filter(|own| own.0 * MARGIN < library.0).unwrap_or(library).1)
    }
}

/// Algorithms of cuBLASLt that are timed for a class.
const CANDIDATES: usize = 8;

impl Matmul {
    /// `[m, k] · [k, n]`, B stored as `[k, n]`.
    pub(super) fn new(m: usize, n: usize, k: usize) -> Matmul {
        Matmul {
            m,
            n,
            k,
            a_transposed: false,
            b_transposed: false,
            wide: false,
            add: false,
            bias: false,
            lds: [0; 4],
            alignments: [0; 4],
        }
    }

    /// Whether a kernel of our own can compute it, and has enough rows to be worth it.
    fn is_gemm(&self) -> bool {
        let aligned = self.alignments.iter().all(|a| *a >= 16) && self.lds.iter().all(|ld| ld % 8 == 0);
        !self.a_transposed && !self.wide && aligned && self.m >= LEAST_ROWS
    }

    /// Shapes that differ little in their rows share an algorithm.
    fn class(&self) -> String {
        // A token at a time is a class of its own: then it is the weights that are read.
        let round = |n: usize| if n == 1 { 1 } else { n.next_multiple_of(CLASS) };
        let flag = |on: bool, letter: &'static str| if on { letter } else { "" };
        format!(
            "{}x{}x{}{}{}{}{}{}",
            round(self.m),
            self.n,
            round(self.k),
            flag(self.a_transposed, " A"),
            flag(self.b_transposed, " B"),
            flag(self.wide, " f32"),
            flag(self.add, " add"),
            flag(self.bias, " bias"),
        )
    }
}

/// Rows below which tiles of our own stay mostly empty.
const LEAST_ROWS: usize = 128;

impl Drop for Matmuls {
    fn drop(&mut self) {
        // An error here means that the context is gone, and the plans with it.
        let _ = self.forget();
    }
}
