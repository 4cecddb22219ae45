// D = X op(W), Hopper: a producer warp copies tiles to shared memory (TMA), two warp groups multiply them (wgmma), blocks walk over tiles
// of D until none is left. X is [tokens, k], W [features, k], or [k, features] with W_ROWS 0. As in cuBLASLt's own kernels for this
// card, tokens are the inner side of a product of the tensor cores, whose size is free there: TOKENS of a tile is chosen so that
// all tiles take whole rounds of the card. A block has 64 features for each warp group. A cluster of two blocks has the same
// tokens: each copies half of them for both.
//
// EPILOGUE is a sum of: 1, C is added; 2, a bias; 4, a gated activation, where W is [gate; up], and D is act(gate) * up; 8, with
// that, C receives gate and up; 16, the VJP of a gated activation, where the product is the gradient of act(gate) * up: C has gate and
// up, D receives their gradients.
//
// With FP8, X and W are e4m3 with a scale for each row: D = (X W^T) of_x of_w + U op(L), where the second product, of bf16, begins with the
// sums of the first, scaled in registers. All rows of X8 have their scale behind them. L is [features, rank], or [rank, features] with
// W_ROWS 0; W is always [features, k], as the tensor cores take no other fp8.
//
// With GROUPED, rows of X are those of `count` groups, and W has their matrices one below the other, each `apart` rows after the
// one before; see groups.cuh. What a tile has behind its group's rows is not stored.

#define DEPTH (FP8 ? 128 : 64)  // 128 bytes
#define GROUPS 2
#define FEATURES (64 * GROUPS)
#define W_BYTES (FEATURES * 128)
#define X_BYTES (TOKENS * 128)
#define STAGE_BYTES (W_BYTES + X_BYTES)
#define CHUNKS (TOKENS / CHUNK)
#define ADDS (EPILOGUE & 1)
#define BIASED (EPILOGUE & 2)
#define GLU (EPILOGUE & 4)
#define KEEPS (EPILOGUE & 8)
#define GLU_VJP (EPILOGUE & 16)
#define FETCHES (ADDS || GLU_VJP)  // C is read
#define WIDTH (GLU ? 32 : 64)  // features of a warp group in D
#define PLANE_BYTES (CHUNK * WIDTH * 2)
#define CHUNK_BYTES (PLANE_BYTES * (KEEPS ? 3 : GLU_VJP ? 2 : 1))  // D, gate, up; or gate and up
#define N8 (TOKENS / 8)

__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count));
}
__device__ __forceinline__ void barrier_expect(u32 at, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 at, u32 parity) {
    asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}"
                 ::"r"(at), "r"(parity) : "memory");
}
// Arrives at the barrier of a block of the cluster that lies at the same place.
__device__ __forceinline__ void barrier_arrive(u32 at, u32 block) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(at), "r"(block) : "memory");
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void copy_in_4d(u32 to, const TensorMap* map, int x, int y, int z, int w, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
                 ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_in(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
// To both blocks of the cluster.
__device__ __forceinline__ void copy_in_both(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"((unsigned short)3) : "memory");
}
__device__ __forceinline__ void copy_out(u32 from, const TensorMap* map, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\ncp.async.bulk.commit_group;"
                 ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}
// Waits until at most N copies out of shared memory still read it.
template <int N>
__device__ __forceinline__ void copies_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

#if W_ROWS
#define W_TRANSPOSED "0"
#else
#define W_TRANSPOSED "1"
#endif

#define EIGHTY(d, n) SIXTEEN(d, n), SIXTEEN(d, n + 4), SIXTEEN(d, n + 8), SIXTEEN(d, n + 12), SIXTEEN(d, n + 16)
#define D16(a) "%" #a "0,%" #a "1,%" #a "2,%" #a "3,%" #a "4,%" #a "5,%" #a "6,%" #a "7,%" #a "8,%" #a "9"
#define D90 D16() "," D16(1) "," D16(2) "," D16(3) "," D16(4) "," D16(5) "," D16(6) "," D16(7) "," D16(8)
#define WGMMA(KIND, FLAGS, N, SUMS, A, B, MORE, ...)                                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" MORE ", 0;\nwgmma.mma_async.sync.aligned.m64n" N KIND " {" SUMS \
                 "}, %" A ", %" B ", p, 1, 1" FLAGS ";\n}" : __VA_ARGS__ : "l"(w), "l"(x), "r"(more))

#if TOKENS == 256
#define PRODUCT(KIND, FLAGS)                                                                                                        \
    WGMMA(KIND, FLAGS, "256", D90 "," D16(9) "," D16(10) "," D16(11) ",%120,%121,%122,%123,%124,%125,%126,%127", "128", "129", "130", \
          EIGHTY(d, 0), SIXTEEN(d, 20), SIXTEEN(d, 24), SIXTEEN(d, 28))
#elif TOKENS == 240
#define PRODUCT(KIND, FLAGS)                                                                                                       \
    WGMMA(KIND, FLAGS, "240", D90 "," D16(9) "," D16(10) "," D16(11), "120", "121", "122", EIGHTY(d, 0), SIXTEEN(d, 20), SIXTEEN(d, 24), \
          FOUR(d, 28), FOUR(d, 29))
#elif TOKENS == 224
#define PRODUCT(KIND, FLAGS)                                                                                                      \
    WGMMA(KIND, FLAGS, "224", D90 "," D16(9) "," D16(10) ",%110,%111", "112", "113", "114", EIGHTY(d, 0), SIXTEEN(d, 20), SIXTEEN(d, 24))
#elif TOKENS == 192
#define PRODUCT(KIND, FLAGS) WGMMA(KIND, FLAGS, "192", D90 ",%90,%91,%92,%93,%94,%95", "96", "97", "98", EIGHTY(d, 0), SIXTEEN(d, 20))
#endif

// sums (+)= 64 rows of W times the tile of X, 32 bytes deep; `more` 0 begins a sum.
__device__ __forceinline__ void multiply(float d[N8][4], u64 w, u64 x, int more) {
    PRODUCT("k16.f32.bf16.bf16", ", " W_TRANSPOSED ", 0");
}
#if FP8
__device__ __forceinline__ void multiply_fp8(float d[N8][4], u64 w, u64 x, int more) { PRODUCT("k32.f32.e4m3.e4m3", ""); }
#endif

template <int N>
__device__ __forceinline__ void done() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// The two values of a word of bf16.
__device__ __forceinline__ float low(u32 two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high(u32 two) { return __uint_as_float(two & 0xffff0000u); }

// Both with the fast exponential and division: a block computes activations while nobody multiplies.
__device__ __forceinline__ float act(float x, float limit) {
    return ACTIVATION == 0 ? __fdividef(x, 1.f + __expf(-x)) : activate(x, ACTIVATION, limit).value;
}

__device__ __forceinline__ Activation act_vjp(float x, float limit) {
    if (ACTIVATION != 0) return activate(x, ACTIVATION, limit);
    float s = __fdividef(1.f, 1.f + __expf(-x));
    return {x * s, s * (1.f + x * (1.f - s))};
}

// Four 8 by 8 parts of a chunk, whose rows are tokens; a lane has rows that are features, as sums have them.
__device__ __forceinline__ void load_transposed(u32* v, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void store_transposed(u32 at, const u32* v) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// The tiles of a cluster, one after the other: one of rows by two of columns. They come in bands of `high` tiles of rows, so that
// what runs at one time reads few rows of either matrix.
struct Tiles {
    int rows, columns, high, at;
#if GROUPED
    const Groups& groups;
    int group, token, end;  // of a tile: its group, its first row, where the group's rows end

    __device__ __forceinline__ void enter(int row) {
        group = groups.of(row);
        token = groups.begins[group] + (row - groups.tiles[group]) * TOKENS, end = groups.begins[group + 1];
    }
#else
    static constexpr int group = 0;
    int token;
    __device__ __forceinline__ void enter(int row) { token = row * TOKENS; }
#endif
    __device__ __forceinline__ bool next(int& row, int& column) {
        if (at >= rows * columns) return false;
        int first = at / (high * columns) * high, own = min(high, rows - first), within = at - first * columns;
        row = first + within % own;
        column = within / own;
        enter(row);
        at += gridDim.x / 2;
        return true;
    }
};

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1) __cluster_dims__(2, 1, 1)
    gemm_hopper(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap c,
                const __grid_constant__ TensorMap d, const bf16* bias, int tokens, int features, int k, int band, float limit
#if FP8
                , const __grid_constant__ TensorMap u, const __grid_constant__ TensorMap l, int r, View of_x, const float* of_w
#endif
#if GROUPED
                , const int* begins, int count, int apart, View out
#endif
    ) {
    extern __shared__ bf16 memory[];
    u32 stages = (shared_address(memory) + 1023) / 1024 * 1024, chunks = stages + STAGES * STAGE_BYTES;
    __shared__ __align__(8) u64 barriers[2 * STAGES + GROUPS * BUFFERS];
    u32 full = shared_address(barriers), empty = full + STAGES * 8, fetched = empty + STAGES * 8;
    u32 rank = cluster_rank();
    int group = threadIdx.x / 128, steps = (k + DEPTH - 1) / DEPTH;
#if FP8
    __shared__ float scales[GROUPS][TOKENS + 64];
    int all_steps = steps + (r + 63) / 64;
#else
    int all_steps = steps;
#endif
    // Features are those of D: with a gated activation, a block has as many of gate and of up.
    constexpr int OWN = WIDTH * GROUPS;
    int columns = (features + 2 * OWN - 1) / (2 * OWN), first = blockIdx.x / 2;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 2 * GROUPS);
        }
        for (int i = 0; i < GROUPS * BUFFERS; i++) barrier_init(fetched + 8 * i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    after_previous();
#if GROUPED
    __shared__ Groups groups;
    groups.cut(begins, count, apart, TOKENS);
    Tiles tiles = {groups.tiles[count], columns, band, first, groups};
#else
    Tiles tiles = {(tokens + TOKENS - 1) / TOKENS, columns, band, first};
#endif

    int row, column;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {
            int stage = 0, phase = 0;
            while (tiles.next(row, column)) {
                int feature = (column * 2 + rank) * OWN, token = tiles.token + rank * (TOKENS / 2);
#if GROUPED
                int before = tiles.group * apart;  // rows of W of the groups before
#else
                constexpr int before = 0;
#endif
                auto copy_step = [&](const TensorMap* x, const TensorMap* w, int column, bool w_rows) {
                    barrier_wait(empty + 8 * stage, phase ^ 1);
                    u32 barrier = full + 8 * stage, at = stages + stage * STAGE_BYTES;
                    barrier_expect(barrier, STAGE_BYTES);
                    if (GLU) {
                        // Eight rows of gate, eight of up: a thread has both.
                        copy_in_4d(at, w, column, 0, 0, feature / 8, barrier);
                    } else if (w_rows) {
                        copy_in(at, w, column, before + feature, barrier);
                    } else {
#pragma unroll
                        for (int i = 0; i < GROUPS; i++) copy_in(at + i * 8192, w, feature + i * 64, before + column, barrier);
                    }
                    copy_in_both(at + W_BYTES + rank * (X_BYTES / 2), x, column, token, barrier);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                };
                for (int step = 0; step < steps; step++) copy_step(&x, &w, step * DEPTH, FP8 || W_ROWS);
#if FP8
                for (int column = 0; column < r; column += 64) copy_step(&u, &l, column, W_ROWS);
#endif
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        int own = group - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        bool leads = threadIdx.x % 128 == 0;
        u32 buffers = chunks + own * BUFFERS * CHUNK_BYTES;
#if FETCHES
        u32 fetched_own = fetched + own * BUFFERS * 8, fetch_phases = 0;  // a bit a buffer
#endif
        int stage = 0, phase = 0, turn = 0;
        while (tiles.next(row, column)) {
            int feature = (column * 2 + rank) * OWN + own * WIDTH, token = tiles.token;
            // Features behind the last one: the stages go by.
            if (feature >= features) {
                for (int step = 0; step < all_steps; step++) {
                    barrier_wait(full + 8 * stage, phase);
                    if (threadIdx.x % 128 < 2) barrier_arrive(empty + 8 * stage, threadIdx.x % 128);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
                continue;
            }
#if FETCHES
            auto fetch = [&](int i) {
                u32 barrier = fetched_own + 8 * (i % BUFFERS), buffer = buffers + i % BUFFERS * CHUNK_BYTES;
                copies_read<0>();
                barrier_expect(barrier, CHUNK_BYTES);
                copy_in(buffer, &c, feature, token + i * CHUNK, barrier);
#if GLU_VJP
                copy_in(buffer + PLANE_BYTES, &c, features + feature, token + i * CHUNK, barrier);
#endif
            };
            turn = 0;
#endif
            // What is fetched first comes where the tile before was, and is asked for when that has been copied out.
            auto fetch_first = [&] {
#if FETCHES
                if (leads)
                    for (int i = 0; i < BUFFERS && i < CHUNKS; i++) fetch(i);
#endif
            };
            float sums[N8][4];
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1209
            // Before CUDA 12.9 ptxas lets products wait for each other (C7515) where their sums begin undefined.
#pragma unroll
            for (int i = 0; i < N8 * 4; i++) sums[i / 4][i % 4] = 0.f;
#pragma unroll
            for (int i = 0; i < N8; i++) asm volatile("" : FOUR(sums, i)::"memory");
#endif
#if FP8
            // Scales of this group's tokens and rows of W, two and a half a thread; they arrive while it multiplies.
            int t = token + threadIdx.x % 128, f = threadIdx.x % 128 % 64;
            auto token_scale = [&](int t) { return t < tokens ? *(const float*)(of_x.at + t * of_x.ld) : 0.f; };
            int scaled = feature + (GLU ? f / 16 * 8 + f % 8 : f);
            float scale_0 = token_scale(t), scale_1 = threadIdx.x % 128 + 128 < TOKENS ? token_scale(t + 128) : 0.f;
            float scale_w = of_w && scaled < features ? of_w[scaled + (GLU && f & 8 ? features : 0)] : 1.f;
#endif
            // The stage before this one is free.
            auto release = [&] {
                if (threadIdx.x % 128 < 2) barrier_arrive(empty + 8 * (stage == 0 ? STAGES - 1 : stage - 1), threadIdx.x % 128);
            };
            auto multiply_step = [&](int step, int depth, bool fp8) {
                barrier_wait(full + 8 * stage, phase);
                u32 at = stages + stage * STAGE_BYTES, w = at + own * 8192, x = at + W_BYTES;
                begin();
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (i * (fp8 ? 32 : 16) >= depth) break;
#if FP8
                    if (fp8) {
                        multiply_fp8(sums, descriptor(w + i * 32, 16), descriptor(x + i * 32, 16), step | i);
                        continue;
                    }
#endif
                    u64 rows = W_ROWS ? descriptor(w + i * 32, 16) : descriptor(w + i * 2048, 8192);
                    multiply(sums, rows, descriptor(x + i * 32, 16), FP8 ? 1 : step | i);
                }
                end();
                done<1>();
                if (step > 0) release();
                if (++stage == STAGES) stage = 0, phase ^= 1;
            };
            auto finish = [&] {
                done<0>();
#pragma unroll
                for (int i = 0; i < N8; i++) asm volatile("" : FOUR(sums, i)::"memory");
                release();
            };
            // Of the last step, what lies behind k is zero, and left out as far as products of 32 bytes go: LoRA's columns fill a part of a step.
            for (int step = 0; step < steps - 1; step++) {
                multiply_step(step, DEPTH, FP8);
                if (step == 2) fetch_first();
            }
            if (steps < 4) fetch_first();
            multiply_step(steps - 1, k - (steps - 1) * DEPTH, FP8);
            finish();
#if FP8
            float* scale = scales[own];
            scale[threadIdx.x % 128] = scale_0;
            if (threadIdx.x % 128 + 128 < TOKENS) scale[threadIdx.x % 128 + 128] = scale_1;
            if (threadIdx.x % 128 < 64) scale[TOKENS + f] = scale_w;
            group_sync(own);
            float first = scale[TOKENS + warp * 16 + lane / 4], second = scale[TOKENS + warp * 16 + 8 + lane / 4];
#pragma unroll
            for (int i = 0; i < N8; i++) {
                float2 two = *(const float2*)(scale + i * 8 + lane % 4 * 2);
                sums[i][0] *= first * two.x, sums[i][1] *= first * two.y;
                sums[i][2] *= second * two.x, sums[i][3] *= second * two.y;
            }
            for (int column = 0; column < r; column += 64) {
                multiply_step(0, min(r - column, 64), false);
                finish();
            }
#endif

            // Where this lane's row of a chunk's eight by eight parts lies: the parts of a warp's features, two times eight tokens, or, of
            // gate or up alone, four times eight.
#if GLU
            auto place = [&](u32 buffer, int part) {
                int t = part * 32 + lane;
                return buffer + t * 64 + ((warp ^ t >> 1 & 3) << 4);
            };
            auto store = [&](u32 plane, const u32 (&v)[CHUNK / 8]) {
#pragma unroll
                for (int j = 0; j + 4 <= CHUNK / 8; j += 4)
                    store_transposed(place(plane, j / 4), v + j);
#if CHUNK % 32
                asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
                             ::"r"(place(plane, CHUNK / 32)), "r"(v[CHUNK / 8 - 2]), "r"(v[CHUNK / 8 - 1]) : "memory");
#endif
            };
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                u32 buffer = buffers + turn * CHUNK_BYTES, gate[CHUNK / 8], up[CHUNK / 8], product[CHUNK / 8];
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++) {
                    const float* from = sums[i * (CHUNK / 8) + j];
                    gate[j] = pack(from[0], from[1]), up[j] = pack(from[2], from[3]);
                    product[j] = pack(act(from[0], limit) * from[2], act(from[1], limit) * from[3]);
                }
                if (leads) copies_read<(KEEPS ? 3 : 1) * (BUFFERS - 1)>();
                group_sync(own);
                store(buffer, product);
                if (KEEPS) {
                    store(buffer + PLANE_BYTES, gate);
                    store(buffer + 2 * PLANE_BYTES, up);
                }
                publish();
                group_sync(own);
                if (leads) {
                    int to = token + i * CHUNK;
                    copy_out(buffer, &d, feature, to);
                    if (KEEPS) {
                        copy_out(buffer + PLANE_BYTES, &c, feature, to);
                        copy_out(buffer + 2 * PLANE_BYTES, &c, features + feature, to);
                    }
                }
                turn = (turn + 1) % BUFFERS;
            }
#else
            auto place = [&](u32 buffer, int part) {
                int t = part * 16 + lane / 16 * 8 + lane % 8, piece = warp * 2 + lane / 8 % 2;
                return buffer + t * 128 + ((piece ^ t & 7) << 4);
            };
#if BIASED
            float shift[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int of = feature + warp * 16 + half * 8 + lane / 4;
                shift[half] = of < features ? to_float(bias[of]) : 0.f;
            }
#endif
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                u32 buffer = buffers + turn * CHUNK_BYTES;
#if FETCHES
                barrier_wait(fetched_own + 8 * turn, fetch_phases >> turn & 1);
                fetch_phases ^= 1 << turn;
#else
                if (leads) copies_read<BUFFERS - 1>();
                group_sync(own);
#endif
#pragma unroll
                for (int j = 0; j < CHUNK / 16; j++) {
                    u32 v[4], at = place(buffer, j);
#if GLU_VJP
                    u32 gate[4], up[4];
                    load_transposed(gate, at);
                    load_transposed(up, at + PLANE_BYTES);
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        const float* from = &sums[i * (CHUNK / 8) + j * 2 + q / 2][q % 2 * 2];
                        Activation a = act_vjp(low(gate[q]), limit), b = act_vjp(high(gate[q]), limit);
                        v[q] = pack(from[0] * low(up[q]) * a.derivative, from[1] * high(up[q]) * b.derivative);
                        up[q] = pack(from[0] * a.value, from[1] * b.value);
                    }
                    store_transposed(at, v);
                    store_transposed(at + PLANE_BYTES, up);
#else
#if ADDS
                    load_transposed(v, at);
#endif
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        const float* from = &sums[i * (CHUNK / 8) + j * 2 + q / 2][q % 2 * 2];
                        float a = from[0], b = from[1];
#if ADDS
                        a += low(v[q]), b += high(v[q]);
#endif
#if BIASED
                        a += shift[q % 2], b += shift[q % 2];
#endif
                        v[q] = pack(a, b);
                    }
                    store_transposed(at, v);
#endif
                }
                publish();
                group_sync(own);
#if GROUPED
                // Where a group's rows end within a chunk, they are stored one by one.
                if (token + (i + 1) * CHUNK > tiles.end) {
                    for (int t = threadIdx.x % 128 / 8; t < CHUNK && token + i * CHUNK + t < tiles.end; t += 16) {
                        int piece = threadIdx.x % 8, to = feature + piece * 8;
                        u32 v[4], from = buffer + t * 128 + ((piece ^ t & 7) << 4);
                        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(from));
                        if (to < features) *(uint4*)(::row(out, token + i * CHUNK + t) + to) = make_uint4(v[0], v[1], v[2], v[3]);
                    }
                    // None, so that as many copies are counted.
                    if (leads) asm volatile("cp.async.bulk.commit_group;" ::: "memory");
                    turn = (turn + 1) % BUFFERS;
                    continue;
                }
#endif
                if (leads) {
                    copy_out(buffer, &d, feature, token + i * CHUNK);
#if GLU_VJP
                    copy_out(buffer + PLANE_BYTES, &d, features + feature, token + i * CHUNK);
#endif
#if FETCHES
                    // A later chunk comes where this one was, once that has been copied out.
                    if (i + BUFFERS < CHUNKS) fetch(i + BUFFERS);
#endif
                }
                turn = (turn + 1) % BUFFERS;
            }
#endif
        }
        if (leads) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    cluster_sync();
}
