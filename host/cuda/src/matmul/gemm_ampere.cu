// D = A · op(B) (+ C) (+ bias), [m, k] by [k, n], in bf16 with sums in f32, with the instructions of Ampere and Ada: tiles come to
// shared memory by cp.async, some stages ahead, and are multiplied by mma.sync. A block goes from tile to tile, and the first
// stages of its next one are under way while it writes the last.
//
// Tiles that do not fill all blocks a last time are cut along k, so that no block is idle: the parts go to memory in f32, and the
// block that is the last to write one of a tile adds all of them in their order. So two runs are equal bit for bit.
//
// Macros: B_TRANSPOSED, whether B lies as [n, k]; TILE_M, TILE_N, TILE_K of a block; WARPS_M, WARPS_N among its rows and its columns,
// of which a warp has 64; STAGES; BLOCKS on a multiprocessor; BAND, rows of tiles that are computed together, so that what they
// read of both matrices stays in the L2 cache. With GATED, B is [gate; up] of n / 2 rows each, D is act(gate) · up, ACTIVATION one of
// activations.cuh, and gate and up themselves are written where there is a place for them. With GROUPED, rows of A are those of groups, and B
// has their matrices one below the other; see groups.cuh.
//
// With FP8 (Ada and later), A and B are e4m3, read along k by both, and k counts pairs of them: what a fragment of sixteen columns of bf16 is in
// memory and in registers, one of 32 codes is too. D = (A · Bᵀ) of_x of_w + U · op(L), whose last term is of bf16 and few columns. All rows of A
// have their scale behind them. L is [n, rank], or [rank, n] with L_ROWS 0.
//
// m is any number; n, k and distances of rows are multiples of 8, addresses of 16 bytes. k may end within a step: what tiles have
// beyond it is zero.

#define THREADS (32 * WARPS_M * WARPS_N)
#define WARP_M (TILE_M / WARPS_M)
#define WARP_N (TILE_N / WARPS_N)
#define FRAGMENTS_M (WARP_M / 16)
#define FRAGMENTS_N (WARP_N / 8)
#define SUBSTEPS (TILE_K / 16)
#define A_BYTES (TILE_M * TILE_K * 2)
#define B_BYTES (TILE_N * TILE_K * 2)
#define STAGE_BYTES (A_BYTES + B_BYTES)

static_assert(WARP_M % 16 == 0 && WARP_N == 64, "a warp has 64 columns");
static_assert(TILE_K == 32 || TILE_K == 64, "rows of a tile are 64 or 128 bytes");
static_assert(!GATED || B_TRANSPOSED, "gate and up are rows");
static_assert(!FP8 || B_TRANSPOSED, "codes are read along k");

struct Problem {
    View a, b, c, d;      // c.at is null where nothing is added
    const bf16* bias;     // null where there is none
    View both;            // a place for gate and up; null where there is none
    int m, n, k;
    float limit;          // of the activation
    int whole, split;     // how many tiles are not cut, a multiple of the blocks; parts of each of the others
    float* parts;         // TILE_M * TILE_N for each part of a tile
    int* arrived;         // 0 for each tile that is cut, before and after
};

// What a product of e4m3 is scaled by, and what is added to it.
struct Scales {
    View of_x, u, l;      // scales of A's rows, U and L
    const float* of_w;    // of B's rows; null where they are 1
    long long rank;       // a multiple of 8
};

// A matrix in shared memory with rows of WIDTH columns: the sixteen bytes that hold columns 8 * chunk on. Eight rows of one
// column, or the rows that one instruction reads, fall into different banks.
template <int WIDTH>
__device__ __forceinline__ u32 place_of(int row, int chunk) {
    int turn = WIDTH == 32 ? row / 2 % 4 : row % 8;
    return row * (WIDTH * 2) + ((chunk ^ turn) * 16);
}

// The chunks of a tile of A or B that a thread copies: ROWS rows of WIDTH columns.
template <int ROWS, int WIDTH>
struct Copier {
    static constexpr int IN_ROW = WIDTH / 8, STEP = THREADS / IN_ROW, COUNT = (ROWS + STEP - 1) / STEP;
    static_assert(STEP % 8 == 0, "all chunks of a thread lie alike in their rows");
    const bf16* from[COUNT];

    static __device__ __forceinline__ int row(int i) { return threadIdx.x / IN_ROW + i * STEP; }
    static __device__ __forceinline__ bool has(int i) { return (i + 1) * STEP <= ROWS || row(i) < ROWS; }
    static __device__ __forceinline__ int column() { return threadIdx.x % IN_ROW * 8; }
    static __device__ __forceinline__ u32 place() { return place_of<WIDTH>(row(0), threadIdx.x % IN_ROW); }
};

#if GROUPED
__shared__ Groups groups;
#endif

// The tile of an index: BAND rows of tiles at a time, column by column. What lies from `end` on is not its own; so many rows of B are
// those of other groups before it.
struct Tile {
    int row, column, end, before;
};

__device__ __forceinline__ Tile tile_of(const Problem& p, int index, int rows, int columns) {
    int band = index / (BAND * columns), first = band * BAND, high = min(BAND, rows - first);
    int in_band = index - band * BAND * columns, row = first + in_band % high, column = in_band / high * TILE_N;
#if GROUPED
    int group = groups.of(row);
    return {groups.begins[group] + (row - groups.tiles[group]) * TILE_M, column, groups.begins[group + 1], group * groups.apart};
#else
    return {row * TILE_M, column, p.m, 0};
#endif
}

// What a block computes at a time: a tile, or its columns of A from `begin` on.
struct Work {
    int tile, part, begin, end;
};

__device__ __forceinline__ Work work_of(const Problem& p, int index) {
    if (index < p.whole) return {index, 0, 0, p.k};
    int cut = (index - p.whole) / p.split, part = index - p.whole - cut * p.split, steps = (p.k + TILE_K - 1) / TILE_K;
    return {p.whole + cut, part, steps * part / p.split * TILE_K, min(steps * (part + 1) / p.split * TILE_K, p.k)};
}

// A row of B's tile in B: with GATED a warp has columns of gate, then the same ones of up.
__device__ __forceinline__ int row_of_b(const Problem& p, int column, int row) {
    if (!GATED) return min(column + row, p.n - 1);
    int of = column / 2 + row / 64 * 32 + row % 32;
    return min(of, p.n / 2 - 1) + (row % 64 < 32 ? 0 : p.n / 2);
}

// Brings tiles of A and B, one step after the other, over all work of a block.
struct Loader {
    Copier<TILE_M, TILE_K> a;
#if B_TRANSPOSED
    Copier<TILE_N, TILE_K> b;
#else
    Copier<TILE_K, TILE_N> b;
#endif
    int index, k, end, slot;

    // Goes to the beginning of a piece of work; behind the last one there is nothing to bring.
    __device__ __forceinline__ void begin(const Problem& p, int rows, int columns, int count) {
        Work work = work_of(p, min(index, count - 1));
        Tile at = tile_of(p, work.tile, rows, columns);
        k = index < count ? work.begin : work.end, end = work.end;
#pragma unroll
        for (int i = 0; i < a.COUNT; i++) a.from[i] = row(p.a, min(at.row + a.row(i), at.end - 1)) + k + a.column();
#pragma unroll
        for (int i = 0; i < b.COUNT; i++) {
#if B_TRANSPOSED
            b.from[i] = row(p.b, at.before + row_of_b(p, at.column, b.row(i))) + k + b.column();
#else
            b.from[i] = row(p.b, at.before + k + b.row(i)) + min(at.column + b.column(), p.n - 8);
#endif
        }
    }

    // Starts copies of the next step: a part of them, of PARTS.
    template <int PART, int PARTS>
    __device__ __forceinline__ void copy(const Problem& p, u32 stages) {
        u32 to = stages + slot * STAGE_BYTES;
#pragma unroll
        for (int i = a.COUNT * PART / PARTS; i < a.COUNT * (PART + 1) / PARTS; i++) {
            if (a.has(i)) copy_async(to + a.place() + i * (a.STEP * TILE_K * 2), a.from[i], k + a.column() < end);
            a.from[i] += TILE_K;
        }
#pragma unroll
        for (int i = b.COUNT * PART / PARTS; i < b.COUNT * (PART + 1) / PARTS; i++) {
#if B_TRANSPOSED
            if (b.has(i)) copy_async(to + A_BYTES + b.place() + i * (b.STEP * TILE_K * 2), b.from[i], k + b.column() < end);
            b.from[i] += TILE_K;
#else
            if (b.has(i)) copy_async(to + A_BYTES + b.place() + i * (b.STEP * TILE_N * 2), b.from[i], k + b.row(i) < end);
            b.from[i] += TILE_K * p.b.ld;
#endif
        }
    }

    // Ends a step.
    __device__ __forceinline__ void next() {
        commit_copies();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        k += TILE_K;
    }

    // Goes to the block's next work where this is done.
    __device__ __forceinline__ void turn(const Problem& p, int rows, int columns, int count) {
        if (k < end || index >= count) return;
        index += gridDim.x;
        begin(p, rows, columns, count);
    }
};

// What a warp multiplies in 16 columns of A: its rows of A, its columns of B.
struct Fragments {
    u32 a[FRAGMENTS_M][4], b[FRAGMENTS_N][2];

    // `at` is the place of the lane's row in a stage.
    __device__ __forceinline__ void load_a(u32 at, int substep, int i) {
        ldmatrix(a[i], (at ^ substep * 32) + i * (16 * TILE_K * 2));
    }

    // Columns of two fragments.
    __device__ __forceinline__ void load_b(u32 at, int substep, int j) {
        u32 both[4];
#if B_TRANSPOSED
        ldmatrix(both, (at ^ substep * 32) + j * (8 * TILE_K * 2));
#else
        ldmatrix_transposed(both, (at ^ j * 16) + substep * (16 * TILE_N * 2));
#endif
        b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
    }
};

// Four words of each of four neighbouring lanes, transposed. Lanes of a fragment have two columns of each of four fragments; then
// they have eight columns of one: 16 bytes. It is its own inverse.
__device__ __forceinline__ void transpose_quad(u32 w[4]) {
    bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
        w[i] = odd ? got : w[i], w[i + 1] = odd ? w[i + 1] : got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 got = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 2], 2);
        w[i] = upper ? got : w[i], w[i + 2] = upper ? w[i + 2] : got;
    }
}

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Writes the 32 columns of four fragments where there is such a row; `to` is the lane's eight columns.
__device__ __forceinline__ void store_quad(bf16* to, u32 w[4], bool there) {
    transpose_quad(w);
    if (there) *(uint4*)to = make_uint4(w[0], w[1], w[2], w[3]);
}

// A warp's sums.
typedef float Sums[FRAGMENTS_M][FRAGMENTS_N][4];

// The first column of a warp's fragment in D, or in [gate; up]; columns beyond the last are computed twice and not written.
__device__ __forceinline__ int feature_of(const Problem& p, int column, int j) {
    return GATED ? min(column / 2 + j % 4 * 8, p.n / 2 - 8) + j / 4 * (p.n / 2) : min(column + j * 8, p.n - 8);
}

// Writes a warp's sums, whose first row of the lane and first column of the warp these are, as far as there are rows.
__device__ __forceinline__ void write(const Problem& p, const Sums sums, int first, int column, int end) {
    int lane = threadIdx.x % 4;
    u32 bias[FRAGMENTS_N] = {};
    if (p.bias) {
#pragma unroll
        for (int j = 0; j < FRAGMENTS_N; j++) {
            bias[j] = *(const u32*)(p.bias + feature_of(p, column, j) + lane * 2);
        }
    }
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M * 2; i++) {
        int token = first + i * 8;
        u32 words[2][4];
#if GATED
        int own = column / 2 + lane * 8;
        bool there = token < end && own < p.n / 2;
#endif
#pragma unroll
        for (int side = 0; side < 2; side++) {
            u32 add[4] = {};
#if !GATED
            int own = column + side * 32 + lane * 8;
            bool there = token < end && own < p.n;
            if (p.c.at) {
                uint4 c = there ? *(const uint4*)(row(p.c, token) + own) : make_uint4(0, 0, 0, 0);
                add[0] = c.x, add[1] = c.y, add[2] = c.z, add[3] = c.w;
                transpose_quad(add);
            }
#endif
#pragma unroll
            for (int f = 0; f < 4; f++) {
                const float* sum = &sums[i / 2][side * 4 + f][i % 2 * 2];
                u32 b = bias[side * 4 + f];
                words[side][f] = pack(sum[0] + low(b) + low(add[f]), sum[1] + high(b) + high(add[f]));
            }
#if !GATED
            store_quad(row(p.d, token) + own, words[side], there);
#endif
        }
#if GATED
        // As a kernel of its own would, the activation reads gate and up in bf16.
        u32 out[4];
#pragma unroll
        for (int f = 0; f < 4; f++) {
            u32 gate = words[0][f], up = words[1][f];
            out[f] = pack(activate(low(gate), ACTIVATION, p.limit).value * low(up),
                          activate(high(gate), ACTIVATION, p.limit).value * high(up));
        }
        store_quad(row(p.d, token) + own, out, there);
        if (p.both.at) {
            store_quad(row(p.both, token) + own, words[0], there);
            store_quad(row(p.both, token) + p.n / 2 + own, words[1], there);
        }
#endif
    }
}

#if FP8
__device__ __forceinline__ void mma_fp8(float c[4], const u32 a[4], const u32 b[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Multiplies sums by the scales of their row and of their column, and adds U · op(L), of which every lane reads its fragments where they lie.
__device__ __forceinline__ void scale_and_adapt(const Problem& p, const Scales& q, Sums sums, int first, int column) {
    int lane = threadIdx.x % 32, pair = lane % 4 * 2;
    auto token = [&](int i) { return min(first + i * 8, p.m - 1); };
#pragma unroll
    for (int j = 0; j < FRAGMENTS_N; j++) {
        float2 w = q.of_w ? *(const float2*)(q.of_w + feature_of(p, column, j) + pair) : make_float2(1.f, 1.f);
#pragma unroll
        for (int i = 0; i < FRAGMENTS_M * 2; i++) {
            float x = *(const float*)row(q.of_x, token(i));
            float* sum = &sums[i / 2][j][i % 2 * 2];
            sum[0] *= x * w.x, sum[1] *= x * w.y;
        }
    }
    for (int r = 0; r < q.rank; r += 16) {
        bool whole = r + 8 < q.rank;
        u32 a[FRAGMENTS_M][4];
#pragma unroll
        for (int i = 0; i < FRAGMENTS_M * 2; i++) {
            const bf16* u = row(q.u, token(i)) + r + pair;
            a[i / 2][i % 2] = *(const u32*)u, a[i / 2][i % 2 + 2] = whole ? *(const u32*)(u + 8) : 0;
        }
#pragma unroll
        for (int j = 0; j < FRAGMENTS_N; j++) {
            int feature = feature_of(p, column, j) + lane / 4;
            u32 b[2] = {};
            for (int half = 0; half <= whole; half++) {
                int at = r + half * 8 + pair;
#if L_ROWS
                b[half] = *(const u32*)(row(q.l, feature) + at);
#else
                b[half] = row(q.l, at)[feature] | (u32)row(q.l, at + 1)[feature] << 16;
#endif
            }
#pragma unroll
            for (int i = 0; i < FRAGMENTS_M; i++) mma(sums[i][j], a[i], b);
        }
    }
}
#endif

// Writes a block's part of a tile. Whether it was the last of the tile's: then `sums` are those of all parts.
__device__ __forceinline__ bool add_parts(const Problem& p, const Work& work, Sums sums) {
    __shared__ bool last;
    int cut = work.tile - p.whole;
    float4* parts = (float4*)p.parts + (long long)cut * p.split * (TILE_M * TILE_N / 4) + threadIdx.x;
    float4* own = parts + work.part * (TILE_M * TILE_N / 4);
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M * FRAGMENTS_N; i++) {
        const float* sum = sums[i / FRAGMENTS_N][i % FRAGMENTS_N];
        own[i * THREADS] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(p.arrived + cut, 1) == p.split - 1;
        if (last) p.arrived[cut] = 0;
    }
    __syncthreads();
    if (!last) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M * FRAGMENTS_N * 4; i++) sums[i / 4 / FRAGMENTS_N][i / 4 % FRAGMENTS_N][i % 4] = 0.f;
    for (int part = 0; part < p.split; part++, parts += TILE_M * TILE_N / 4) {
#pragma unroll
        for (int i = 0; i < FRAGMENTS_M * FRAGMENTS_N; i++) {
            float4 add = __ldcg(parts + i * THREADS);
            float* sum = sums[i / FRAGMENTS_N][i % FRAGMENTS_N];
            sum[0] += add.x, sum[1] += add.y, sum[2] += add.z, sum[3] += add.w;
        }
    }
    return true;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemm_ampere(Problem p
#if FP8
                                                                                     , Scales q
#endif
#if GROUPED
                                                                                     , const int* begins, int count_of_groups, int apart
#endif
) {
    extern __shared__ __align__(128) unsigned char memory[];
    u32 stages = shared_address(memory);
#if GROUPED
    groups.cut(begins, count_of_groups, apart, TILE_M);
    int rows = groups.tiles[count_of_groups];
    if (rows == 0) return;
#else
    int rows = (p.m + TILE_M - 1) / TILE_M;
#endif
    int columns = (p.n + TILE_N - 1) / TILE_N;
    int count = p.whole + (rows * columns - p.whole) * p.split;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int warp_m = warp % WARPS_M * WARP_M, warp_n = warp / WARPS_M * WARP_N;

    Loader loader;
    loader.index = blockIdx.x, loader.slot = 0;
    loader.begin(p, rows, columns, count);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        loader.turn(p, rows, columns, count);
        loader.copy<0, 1>(p, stages);
        loader.next();
    }

    u32 a_at = place_of<TILE_K>(warp_m + lane % 16, lane / 16);
#if B_TRANSPOSED
    u32 b_at = A_BYTES + place_of<TILE_K>(warp_n + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#else
    u32 b_at = A_BYTES + place_of<TILE_N>(lane % 16, warp_n / 8 + lane / 16);
#endif
    copies_done<STAGES - 2>();
    __syncthreads();
    Fragments fragments[2];
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; i++) fragments[0].load_a(stages + a_at, 0, i);
#pragma unroll
    for (int j = 0; j < FRAGMENTS_N; j += 2) fragments[0].load_b(stages + b_at, 0, j);
    int slot = 0;

    for (int index = blockIdx.x; index < count; index += gridDim.x) {
        Work work = work_of(p, index);
        Sums sums = {};
        for (int k = work.begin; k < work.end; k += TILE_K) {
            loader.turn(p, rows, columns, count);
#pragma unroll
            for (int s = 0; s < SUBSTEPS; s++) {
                if (s == SUBSTEPS - 1) {
                    // The next step's tiles are there, and every warp has read this step's.
                    loader.next();
                    copies_done<STAGES - 2>();
                    __syncthreads();
                    slot = slot + 1 == STAGES ? 0 : slot + 1;
                }
                u32 at = stages + slot * STAGE_BYTES;
                Fragments &now = fragments[s % 2], &then = fragments[(s + 1) % 2];
                // Loads of the next substep's fragments, and copies, stand between this one's products.
#pragma unroll
                for (int i = 0; i < FRAGMENTS_M; i++) {
#pragma unroll
                    for (int j = FRAGMENTS_N / 2 * i / FRAGMENTS_M; j < FRAGMENTS_N / 2 * (i + 1) / FRAGMENTS_M; j++) {
                        then.load_b(at + b_at, (s + 1) % SUBSTEPS, 2 * j);
                    }
                    then.load_a(at + a_at, (s + 1) % SUBSTEPS, i);
                    if (s == 0 && i == 0) loader.copy<0, 2>(p, stages);
                    if (s == 0 && i == FRAGMENTS_M / 2) loader.copy<1, 2>(p, stages);
#pragma unroll
                    for (int j = 0; j < FRAGMENTS_N; j++) {
                        int column = i % 2 ? FRAGMENTS_N - 1 - j : j;  // B's last fragment is the next row's first
#if FP8
                        mma_fp8(sums[i][column], now.a[i], now.b[column]);
#else
                        mma(sums[i][column], now.a[i], now.b[column]);
#endif
                    }
                }
            }
        }
        if (index >= p.whole && !add_parts(p, work, sums)) continue;
        Tile at = tile_of(p, work.tile, rows, columns);
#if FP8
        scale_and_adapt(p, q, sums, at.row + warp_m + lane / 4, at.column + warp_n);
#endif
        write(p, sums, at.row + warp_m + lane / 4, at.column + warp_n, at.end);
    }
}
