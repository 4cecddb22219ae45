//! Matmuls through cuBLASLt. Algorithms are timed once for a class of shapes on a kind of GPU and kept on disk, so
//! that later runs, and the same run again, compute the same bits.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_int, c_void};
use std::fmt::{self, Display};
use std::fs::File;
use std::ptr;

use super::api::{self, Algorithm, CublasLt, Handle, Heuristic, Status};
use super::gpu::{Address, Gpu, Memory, View};
use super::libraries;
use dpo_core::cache;
use dpo_core::error::{Error, Result};

/// Scratch of the matmuls.
pub(super) const WORKSPACE: usize = 64 << 20;

/// cuBLASLt on one GPU.
pub(super) struct Blas {
    handle: Handle,
    library: &'static CublasLt,
    workspace: Memory,
    plans: RefCell<HashMap<Matmul, Plan>>,
    /// Algorithms by [`Matmul::class`].
    tuned: RefCell<BTreeMap<String, Algorithm>>,
    /// Whether algorithms are timed: results are then of no use.
    tuning: Cell<bool>,
    /// Of the cache's entry: the card and the library.
    name: String,
}

/// Rows of a class of shapes are a multiple of this.
pub(super) const CLASS: usize = 512;

/// Algorithms that are timed for a class.
const CANDIDATES: usize = 8;

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

struct Plan {
    description: Handle,
    layouts: [Handle; 4],
    algorithm: Algorithm,
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

/// What a function of cuBLASLt returned, as a result.
fn done(library: &CublasLt, what: impl Display, status: Status) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: cuBLASLt returns a text that it keeps.
    let said = unsafe { api::text((library.cublasLtGetStatusName)(status)) };
    Err(Error::run(format!("cuBLASLt: {what}: {said}")))
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

impl Blas {
    pub(super) fn new(gpu: &Gpu) -> Result<Blas> {
        let library = libraries::table::<CublasLt>()?;
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        done(library, "starting", unsafe { (library.cublasLtCreate)(&mut handle) })?;
        // SAFETY: takes nothing and returns a number.
        let version = unsafe { (library.cublasLtGetVersion)() };
        let name = format!("{}-cublas-{version}", gpu.name.replace(' ', "-"));
        Ok(Blas {
            handle,
            library,
            workspace: gpu.allocate(WORKSPACE)?,
            plans: RefCell::default(),
            tuned: RefCell::new(read(&name)),
            tuning: Cell::new(false),
            name,
        })
    }

    /// Scratch of [`WORKSPACE`] bytes, for steps that start matmuls before or after.
    pub(super) fn workspace(&self) -> Address {
        self.workspace.address
    }

    /// Runs `body`, in which algorithms are timed for classes that have none; then keeps them on disk. Products in `body` leave
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
        for (matmul, plan) in self.plans.borrow_mut().drain() {
            self.destroy(&matmul, plan)?;
        }
        Ok(())
    }

    /// Starts a matmul.
    pub(super) fn run(&self, gpu: &Gpu, mut matmul: Matmul, on: Operands) -> Result<()> {
        if matmul.m == 0 || matmul.n == 0 {
            return Ok(());
        }
        let of = [on.a, on.b, on.c, on.d];
        matmul.lds = of.map(|v| v.ld);
        matmul.alignments = of.map(|v| 1 << v.at.trailing_zeros().min(8));
        let mut plans = self.plans.borrow_mut();
        let plan = match plans.entry(matmul) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => new.insert(self.plan(gpu, &matmul, on)?),
        };
        self.start(gpu, &matmul, plan, on)
    }

    fn start(&self, gpu: &Gpu, matmul: &Matmul, plan: &Plan, on: Operands) -> Result<()> {
        let (alpha, beta) = (1.0_f32, if matmul.add { 1.0_f32 } else { 0.0 });
        let number = |v: &f32| (v as *const f32).cast::<c_void>();
        let at = |a: Address| a as *const c_void;
        // SAFETY: the plan was made for these layouts; addresses are of the device. In columns, as cuBLASLt counts,
        // the matmul reads Dᵀ = op(B)ᵀ · op(A)ᵀ.
        unsafe {
            if matmul.bias {
                let status = (self.library.cublasLtMatmulDescSetAttribute)(
                    plan.description,
                    api::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    (&raw const on.bias).cast(),
                    size_of::<Address>(),
                );
                done(self.library, matmul, status)?;
            }
            let status = (self.library.cublasLtMatmul)(
                self.handle,
                plan.description,
                number(&alpha),
                at(on.b.at),
                plan.layouts[1],
                at(on.a.at),
                plan.layouts[0],
                number(&beta),
                at(if matmul.add { on.c.at } else { on.d.at }),
                plan.layouts[2],
                on.d.at as *mut c_void,
                plan.layouts[3],
                &plan.algorithm,
                self.workspace.address as *mut c_void,
                WORKSPACE,
                gpu.stream(),
            );
            done(self.library, matmul, status)
        }
    }

    fn plan(&self, gpu: &Gpu, p: &Matmul, on: Operands) -> Result<Plan> {
        let library = self.library;
        let narrow = api::CUDA_R_16BF;
        let out = if p.wide { api::CUDA_R_32F } else { narrow };
        // Rows of ours are columns of cuBLASLt's.
        let layout = |rows: usize, columns: usize, ld: i64, dtype| -> Result<Handle> {
            let mut layout = ptr::null_mut();
            let (rows, columns) = (columns as u64, rows as u64);
            // SAFETY: writes one handle.
            done(library, p, unsafe { (library.cublasLtMatrixLayoutCreate)(&mut layout, dtype, rows, columns, ld) })?;
            Ok(layout)
        };
        let a = if p.a_transposed { layout(p.k, p.m, p.lds[0], narrow) } else { layout(p.m, p.k, p.lds[0], narrow) }?;
        let b = if p.b_transposed { layout(p.n, p.k, p.lds[1], narrow) } else { layout(p.k, p.n, p.lds[1], narrow) }?;
        let layouts =
            [a, b, layout(p.m, p.n, if p.add { p.lds[2] } else { p.lds[3] }, out)?, layout(p.m, p.n, p.lds[3], out)?];
        let (mut description, mut preference) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: writes one handle each.
        unsafe {
            let (sums, scales) = (api::CUBLAS_COMPUTE_32F, api::CUDA_R_32F);
            done(library, p, (library.cublasLtMatmulDescCreate)(&mut description, sums, scales))?;
            done(library, p, (library.cublasLtMatmulPreferenceCreate)(&mut preference))?;
        }
        let operation = |transposed: bool| -> i32 { i32::from(transposed) };
        // SAFETY: every attribute is given with its type's size; handles are alive.
        unsafe {
            let set = |which, value: *const c_void, size| {
                done(library, p, (library.cublasLtMatmulDescSetAttribute)(description, which, value, size))
            };
            // cuBLASLt's first matrix is our B.
            let (first, second) = (operation(p.b_transposed), operation(p.a_transposed));
            set(api::CUBLASLT_MATMUL_DESC_TRANSA, (&raw const first).cast(), 4)?;
            set(api::CUBLASLT_MATMUL_DESC_TRANSB, (&raw const second).cast(), 4)?;
            if p.bias {
                let epilogue = api::CUBLASLT_EPILOGUE_BIAS;
                set(api::CUBLASLT_MATMUL_DESC_EPILOGUE, (&raw const epilogue).cast(), size_of_val(&epilogue))?;
                let dtype = narrow;
                set(api::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, (&raw const dtype).cast(), size_of_val(&dtype))?;
            }
            let prefer = |which, value: *const c_void, size| {
                done(library, p, (library.cublasLtMatmulPreferenceSetAttribute)(preference, which, value, size))
            };
            let bytes = WORKSPACE;
            prefer(api::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const bytes).cast(), size_of_val(&bytes))?;
            // Sums over parts go through the workspace in a fixed order: two runs are equal bit for bit.
            let reduction = api::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
            prefer(api::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const reduction).cast(), 4)?;
            let sides = [
                (api::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, p.alignments[1]),
                (api::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, p.alignments[0]),
                (api::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, p.alignments[if p.add { 2 } else { 3 }]),
                (api::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, p.alignments[3]),
            ];
            for (which, bytes) in sides {
                prefer(which, (&raw const bytes).cast(), 4)?;
            }
            let mut plan = Plan { description, layouts, algorithm: [0; 8] };
            let known = self.tuned.borrow().get(&p.class()).copied();
            if let Some(algorithm) = known.filter(|a| self.fits(&plan, a)) {
                plan.algorithm = algorithm;
            } else {
                let mut candidates = self.candidates(p, &plan, preference)?;
                if self.tuning.get() {
                    self.time(gpu, p, &mut plan, &mut candidates, on)?;
                    self.tuned.borrow_mut().insert(p.class(), candidates[0]);
                }
                plan.algorithm = candidates[0];
            }
            done(library, p, (library.cublasLtMatmulPreferenceDestroy)(preference))?;
            Ok(plan)
        }
    }

    /// Whether an algorithm that was timed for a class can run this shape.
    fn fits(&self, plan: &Plan, algorithm: &Algorithm) -> bool {
        let [a, b, c, d] = plan.layouts;
        let mut answer = Heuristic::default();
        let check = self.library.cublasLtMatmulAlgoCheck;
        // SAFETY: handles are alive; writes one answer.
        let status = unsafe { check(self.handle, plan.description, b, a, c, d, algorithm, &mut answer) };
        status == 0 && answer.workspaceSize <= WORKSPACE
    }

    /// Algorithms for a shape, as cuBLASLt ranks them; at least one.
    fn candidates(&self, matmul: &Matmul, plan: &Plan, preference: Handle) -> Result<Vec<Algorithm>> {
        let [a, b, c, d] = plan.layouts;
        let asked = if self.tuning.get() { CANDIDATES } else { 1 };
        let mut found = vec![Heuristic::default(); asked];
        let mut count = 0;
        // SAFETY: handles are alive; `found` has room for as many as are asked for.
        let status = unsafe {
            (self.library.cublasLtMatmulAlgoGetHeuristic)(
                self.handle,
                plan.description,
                b,
                a,
                c,
                d,
                preference,
                asked as c_int,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        done(self.library, matmul, status)?;
        let good: Vec<_> = found.iter().take(count as usize).filter(|f| f.state == 0).map(|f| f.algo).collect();
        if good.is_empty() {
            done(self.library, matmul, api::CUBLAS_STATUS_NOT_SUPPORTED)?;
        }
        Ok(good)
    }

    fn destroy(&self, matmul: &Matmul, plan: Plan) -> Result<()> {
        let library = self.library;
        // SAFETY: made by `plan`, destroyed once.
        unsafe {
            done(library, matmul, (library.cublasLtMatmulDescDestroy)(plan.description))?;
            plan.layouts.iter().try_for_each(|l| done(library, matmul, (library.cublasLtMatrixLayoutDestroy)(*l)))
        }
    }

    /// Sorts algorithms by their time; the median of three runs after one.
    fn time(
        &self,
        gpu: &Gpu,
        matmul: &Matmul,
        plan: &mut Plan,
        candidates: &mut [Algorithm],
        on: Operands,
    ) -> Result<()> {
        let mut times = Vec::new();
        for (place, algorithm) in candidates.iter().enumerate() {
            plan.algorithm = *algorithm;
            self.start(gpu, matmul, plan, on)?;
            let mut runs = [0.0_f32; 3];
            for run in &mut runs {
                *run = gpu.time(|| self.start(gpu, matmul, plan, on))?;
            }
            runs.sort_by(f32::total_cmp);
            times.push((runs[1], place));
        }
        let first = times[0].0;
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        // Within its spread a time says nothing: then cuBLASLt's ranking stays.
        if times[0].0 < first * 0.98 {
            candidates.swap(0, times[0].1);
        }
        Ok(())
    }
}

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

impl Drop for Blas {
    fn drop(&mut self) {
        // An error here means that the context is gone, and the plans with it.
        let _ = self.forget();
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { (self.library.cublasLtDestroy)(self.handle) };
    }
}
