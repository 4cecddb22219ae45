//! Matmuls: cuBLASLt's, and kernels of our own, which take more than it does into their ends. Which of them computes a class of shapes is
//! timed once on a kind of GPU and kept on disk, so that later runs, and the same run again, compute the same bits. Matmuls of one row,
//! and skinny ones, of few, have kernels of their own.

mod ampere;
mod dispatch;
mod gemm;
mod gemv;
mod hopper;
mod library;
mod skinny;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Display};
use std::fs::File;

use serde::{Deserialize, Serialize};

pub(crate) use dispatch::Gated;
pub(super) use dispatch::{gates, has_fp8};
pub use gemm::Gates;
pub(crate) use gemm::{Fp8, Gemm, Groups};
pub(super) use library::WORKSPACE;
pub(crate) use skinny::MOST_ROWS as SKINNY_ROWS;

use super::api;
use super::gpu::{Address, Gpu, Memory, View};
use super::kernels::{Kernels, Source};
use dpo_core::cache;
use dpo_core::error::{Error, Result};
use library::{Library, Plan};

/// What matmuls are started with.
#[derive(Clone, Copy)]
pub(super) struct On<'a> {
    pub gpu: &'a Gpu,
    pub kernels: &'a Kernels,
    pub matmuls: &'a Matmuls,
}

/// Kernels of our own.
pub(super) static SOURCES: [&Source; 4] = [&hopper::SOURCE, &ampere::SOURCE, &gemv::SOURCE, &skinny::SOURCE];

/// All matmuls of one GPU.
pub(super) struct Matmuls {
    library: Library,
    /// Zero, between matmuls.
    arrived: Memory,
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

/// Rows of small classes of shapes are a multiple of this.
pub(super) const CLASS: usize = 512;

/// The most rows of the class that so many are in: they differ by 512, or by an eighth to a quarter.
pub(super) fn class_of(rows: usize) -> usize {
    rows.next_multiple_of((rows.next_power_of_two() / 8).max(CLASS))
}

/// Rows up to which a class has half as many as the next one: answers of some sequences at a time.
const SMALL_CLASSES: usize = 128;

/// The most rows of the class that so few are in.
fn skinny_class(rows: usize) -> usize {
    if rows == 1 { 1 } else { rows.next_power_of_two().max(8) }
}

/// The most rows of each class of matmuls for the next tokens of at most so many sequences.
pub(super) fn skinny_classes(sequences: usize) -> impl Iterator<Item = usize> {
    let powers = std::iter::successors(Some(1), |rows| Some(skinny_class(rows + 1)));
    powers.take_while(move |rows| *rows < sequences.min(SMALL_CLASSES)).chain([sequences])
}

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

/// Bytes of counters: a tile that is cut has two blocks at least, so that a thousand are more than any card needs.
const ARRIVED: usize = 4 << 10;

/// Where algorithms are cached.
const CACHE: &str = "products";

/// Within its spread a time says nothing: so much of cuBLASLt's first choice another of its algorithms has to take.
const SPREAD: f32 = 0.98;

/// So much of the time of a kernel of our own cuBLASLt has to take to be chosen. Ours fits its tiles to the rows at hand, of which a class
/// has many, and on a card that is hot it gains on the library (docs/performance.md); times are taken on a cold one.
const OWN_MARGIN: f32 = 0.96;

impl Matmuls {
    pub(super) fn new(gpu: &Gpu) -> Result<Matmuls> {
        let library = Library::new(gpu)?;
        let card = gpu.name.replace(' ', "-");
        let name = format!("{card}-sm_{}-cublas-{}-gemm-{}", gpu.kernels, library.version(), dispatch::version());
        let arrived = gpu.allocate(ARRIVED)?;
        gpu.zero(arrived.address, ARRIVED)?;
        Ok(Matmuls {
            library,
            arrived,
            plans: RefCell::default(),
            tuned: RefCell::new(read(&name)),
            tuning: Cell::new(false),
            name,
        })
    }

    /// Scratch of [`WORKSPACE`] bytes, for steps that start matmuls before or after.
    pub(super) fn workspace(&self) -> Address {
        self.library.workspace()
    }

    /// Counters of blocks that have arrived, one for each tile that some blocks compute together: zero before and after a matmul.
    fn arrived(&self) -> Address {
        self.arrived.address
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
    pub(super) fn run(&self, on: On<'_>, mut matmul: Matmul, operands: Operands) -> Result<()> {
        if matmul.m == 0 || matmul.n == 0 {
            return Ok(());
        }
        let of = [operands.a, operands.b, operands.c, operands.d];
        matmul.lds = of.map(|v| v.ld);
        matmul.alignments = of.map(|v| 1 << v.at.trailing_zeros().min(8));
        if matmul.is_gemv() {
            return matmul.start_gemv(on, operands);
        }
        if matmul.is_skinny() {
            return matmul.start_skinny(on, operands);
        }
        let mut plans = self.plans.borrow_mut();
        let (plan, algorithm) = match plans.entry(matmul) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => new.insert(self.plan(on, &matmul, operands)?),
        };
        self.start(on, (&matmul, plan), *algorithm, operands)
    }

    fn start(
        &self,
        on: On<'_>,
        (matmul, plan): (&Matmul, &Plan),
        algorithm: Algorithm,
        operands: Operands,
    ) -> Result<()> {
        match algorithm {
            Algorithm::CublasLt(algorithm) => self.library.start(on.gpu, matmul, plan, &algorithm, operands),
            Algorithm::Gemm => Gemm::of(matmul).launch(on, [matmul.m, matmul.n, matmul.k], operands),
        }
    }

    fn plan(&self, on: On<'_>, matmul: &Matmul, operands: Operands) -> Result<(Plan, Algorithm)> {
        let plan = self.library.plan(matmul)?;
        let known = self.tuned.borrow().get(&matmul.class()).copied();
        let own = matmul.is_gemm() && Gemm::of(matmul).is_loaded(on.kernels, on.gpu.kernels);
        // Kernels for another card would not be compared with a library that has those of this one.
        if own && on.gpu.kernels != on.gpu.capability {
            return Ok((plan, Algorithm::Gemm));
        }
        let fits = |algorithm: &Algorithm| match algorithm {
            Algorithm::CublasLt(algorithm) => self.library.fits(&plan, algorithm),
            Algorithm::Gemm => own,
        };
        if let Some(algorithm) = known.filter(fits) {
            return Ok((plan, algorithm));
        }
        if own && !self.tuning.get() {
            return Ok((plan, Algorithm::Gemm));
        }
        let found = self.library.candidates(matmul, &plan, if self.tuning.get() { CANDIDATES } else { 1 })?;
        let mut candidates: Vec<Algorithm> = found.into_iter().map(Algorithm::CublasLt).collect();
        if !self.tuning.get() {
            return Ok((plan, candidates[0]));
        }
        candidates.extend(own.then_some(Algorithm::Gemm));
        let fastest = self.fastest(on, (matmul, &plan), &candidates, operands)?;
        self.tuned.borrow_mut().insert(matmul.class(), fastest);
        Ok((plan, fastest))
    }

    /// The fastest of some algorithms, of which the first is cuBLASLt's choice; by the median of three runs after one.
    fn fastest(
        &self,
        on: On<'_>,
        matmul: (&Matmul, &Plan),
        candidates: &[Algorithm],
        operands: Operands,
    ) -> Result<Algorithm> {
        let mut times = Vec::new();
        for algorithm in candidates {
            let start = || self.start(on, matmul, *algorithm, operands);
            start()?;
            let mut runs = [0.0_f32; 3];
            for run in &mut runs {
                *run = on.gpu.time(start)?;
            }
            runs.sort_by(f32::total_cmp);
            times.push((runs[1], *algorithm));
        }
        let own = times.pop_if(|(_, algorithm)| matches!(algorithm, Algorithm::Gemm));
        let first = times[0];
        let best = times.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or(first);
        let library = if best.0 < first.0 * SPREAD { best } else { first };
        Ok(own.filter(|own| own.0 * OWN_MARGIN < library.0).unwrap_or(library).1)
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
        let round = |n: usize| if n == 1 { 1 } else { class_of(n) };
        // Of few tokens at a time it is the weights that are read.
        let rows = if self.a_transposed || self.m > SMALL_CLASSES { round(self.m) } else { skinny_class(self.m) };
        let flag = |on: bool, letter: &'static str| if on { letter } else { "" };
        format!(
            "{}x{}x{}{}{}{}{}{}",
            rows,
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
