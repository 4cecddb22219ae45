//! Matmuls through cuBLASLt. Algorithms are timed once for a class of shapes on a kind of GPU and kept on disk, so
//! that later runs, and the same run again, compute the same bits.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::fs::File;
use std::mem::MaybeUninit;

use cudarc::cublaslt::{result, sys};

use super::gpu::{Address, Gpu, Memory, View};
use dpo_core::cache;
use dpo_core::error::{Error, Result};

/// Scratch of the matmuls.
pub(super) const WORKSPACE: usize = 64 << 20;

/// cuBLASLt on one GPU.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
    plans: RefCell<HashMap<Matmul, Plan>>,
    /// Algorithms by [`Matmul::class`].
    tuned: RefCell<BTreeMap<String, [u64; 8]>>,
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
    description: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 4],
    algorithm: sys::cublasLtMatmulAlgo_t,
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

fn failed(matmul: &Matmul) -> impl FnOnce(result::CublasError) -> Error + '_ {
    move |e| {
        Error::run(format!("cuBLASLt: matmul of [{}, {}] and [{}, {}]: {e:?}", matmul.m, matmul.k, matmul.k, matmul.n))
    }
}

/// Algorithms that were found before. What cannot be read is timed again.
fn read(name: &str) -> BTreeMap<String, [u64; 8]> {
    cache::read(CACHE, name).and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Where algorithms are cached.
const CACHE: &str = "products";

impl Blas {
    pub(super) fn new(gpu: &Gpu) -> Result<Blas> {
        let handle = result::create_handle().map_err(|e| Error::run(format!("cuBLASLt does not start: {e:?}")))?;
        // SAFETY: takes nothing and returns a number.
        let version = unsafe { sys::cublasLtGetVersion() };
        let name = format!("{}-cublas-{version}", gpu.name.replace(' ', "-"));
        Ok(Blas {
            handle,
            workspace: gpu.allocate(WORKSPACE)?,
            plans: RefCell::default(),
            tuned: RefCell::new(read(&name)),
            tuning: Cell::new(false),
            name,
        })
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
            plan.destroy().map_err(failed(&matmul))?;
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
                result::set_matmul_desc_attribute(
                    plan.description,
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    (&raw const on.bias).cast(),
                    size_of::<Address>(),
                )
                .map_err(failed(matmul))?;
            }
            result::matmul(
                self.handle,
                plan.description,
                number(&alpha),
                number(&beta),
                at(on.b.at),
                plan.layouts[1],
                at(on.a.at),
                plan.layouts[0],
                at(if matmul.add { on.c.at } else { on.d.at }),
                plan.layouts[2],
                on.d.at as *mut c_void,
                plan.layouts[3],
                &plan.algorithm,
                self.workspace.address as *mut c_void,
                WORKSPACE,
                gpu.stream().cast(),
            )
            .map_err(failed(matmul))
        }
    }

    fn plan(&self, gpu: &Gpu, p: &Matmul, on: Operands) -> Result<Plan> {
        use sys::cublasLtMatmulDescAttributes_t as Desc;
        use sys::cublasLtMatmulPreferenceAttributes_t as Pref;
        let narrow = sys::cudaDataType_t::CUDA_R_16BF;
        let out = if p.wide { sys::cudaDataType_t::CUDA_R_32F } else { narrow };
        // Rows of ours are columns of cuBLASLt's.
        let layout = |rows: usize, columns: usize, ld: i64, dtype| {
            result::create_matrix_layout(dtype, columns as u64, rows as u64, ld).map_err(failed(p))
        };
        let a = if p.a_transposed { layout(p.k, p.m, p.lds[0], narrow) } else { layout(p.m, p.k, p.lds[0], narrow) }?;
        let b = if p.b_transposed { layout(p.n, p.k, p.lds[1], narrow) } else { layout(p.k, p.n, p.lds[1], narrow) }?;
        let layouts =
            [a, b, layout(p.m, p.n, if p.add { p.lds[2] } else { p.lds[3] }, out)?, layout(p.m, p.n, p.lds[3], out)?];
        let description =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)
                .map_err(failed(p))?;
        let preference = result::create_matmul_pref().map_err(failed(p))?;
        let operation = |transposed: bool| -> i32 { i32::from(transposed) };
        // SAFETY: every attribute is given with its type's size; handles are alive.
        unsafe {
            let set = |which, value: *const c_void, size| {
                result::set_matmul_desc_attribute(description, which, value, size).map_err(failed(p))
            };
            // cuBLASLt's first matrix is our B.
            let (first, second) = (operation(p.b_transposed), operation(p.a_transposed));
            set(Desc::CUBLASLT_MATMUL_DESC_TRANSA, (&raw const first).cast(), 4)?;
            set(Desc::CUBLASLT_MATMUL_DESC_TRANSB, (&raw const second).cast(), 4)?;
            if p.bias {
                let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
                set(Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, (&raw const epilogue).cast(), size_of_val(&epilogue))?;
                let dtype = narrow;
                set(Desc::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, (&raw const dtype).cast(), size_of_val(&dtype))?;
            }
            let prefer = |which, value: *const c_void, size| {
                result::set_matmul_pref_attribute(preference, which, value, size).map_err(failed(p))
            };
            let bytes = WORKSPACE;
            prefer(Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const bytes).cast(), size_of_val(&bytes))?;
            // Sums over parts go through the workspace in a fixed order: two runs are equal bit for bit.
            let reduction = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            prefer(Pref::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const reduction).cast(), 4)?;
            let sides = [
                (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, p.alignments[1]),
                (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, p.alignments[0]),
                (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, p.alignments[if p.add { 2 } else { 3 }]),
                (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, p.alignments[3]),
            ];
            for (which, bytes) in sides {
                prefer(which, (&raw const bytes).cast(), 4)?;
            }
            let mut plan = Plan { description, layouts, algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] } };
            let known = self.tuned.borrow().get(&p.class()).map(|data| sys::cublasLtMatmulAlgo_t { data: *data });
            if let Some(algorithm) = known.filter(|a| self.fits(&plan, a)) {
                plan.algorithm = algorithm;
            } else {
                let mut candidates = self.candidates(&plan, preference).map_err(failed(p))?;
                if self.tuning.get() {
                    self.time(gpu, p, &mut plan, &mut candidates, on)?;
                    self.tuned.borrow_mut().insert(p.class(), candidates[0].data);
                }
                plan.algorithm = candidates[0];
            }
            result::destroy_matmul_pref(preference).map_err(failed(p))?;
            Ok(plan)
        }
    }

    /// Whether an algorithm that was timed for a class can run this shape.
    fn fits(&self, plan: &Plan, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
        let [a, b, c, d] = plan.layouts;
        let mut answer = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: handles are alive; the answer is plain numbers, for which zeros are valid.
        let (status, answer) = unsafe {
            let status =
                sys::cublasLtMatmulAlgoCheck(self.handle, plan.description, b, a, c, d, algorithm, answer.as_mut_ptr());
            (status, answer.assume_init())
        };
        status.result().is_ok() && answer.workspaceSize <= WORKSPACE
    }

    /// Algorithms for a shape, as cuBLASLt ranks them; at least one.
    fn candidates(
        &self,
        plan: &Plan,
        preference: sys::cublasLtMatmulPreference_t,
    ) -> std::result::Result<Vec<sys::cublasLtMatmulAlgo_t>, result::CublasError> {
        let [a, b, c, d] = plan.layouts;
        let asked = if self.tuning.get() { CANDIDATES } else { 1 };
        let mut found = vec![MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed(); asked];
        let mut count = 0;
        // SAFETY: handles are alive; `found` has room for as many as are asked for, and zeros are valid in it.
        let found: Vec<_> = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.description,
                b,
                a,
                c,
                d,
                preference,
                asked as i32,
                found.as_mut_ptr().cast(),
                &mut count,
            )
            .result()?;
            found.into_iter().map(|f| f.assume_init()).take(count as usize).collect()
        };
        let good: Vec<_> = found.iter().filter(|f| f.state.result().is_ok()).map(|f| f.algo).collect();
        if good.is_empty() {
            return Err(result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
        }
        Ok(good)
    }

    /// Sorts algorithms by their time; the median of three runs after one.
    fn time(
        &self,
        gpu: &Gpu,
        matmul: &Matmul,
        plan: &mut Plan,
        candidates: &mut [sys::cublasLtMatmulAlgo_t],
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

impl Plan {
    fn destroy(self) -> std::result::Result<(), result::CublasError> {
        // SAFETY: made by `Blas::plan`, destroyed once.
        unsafe {
            result::destroy_matmul_desc(self.description)?;
            for layout in self.layouts {
                result::destroy_matrix_layout(layout)?;
            }
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
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
