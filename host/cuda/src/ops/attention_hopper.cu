// Attention for Hopper's tensor cores, as in attention.cu but for who multiplies: a warp group takes its 64 rows times a tile
// that wgmma reads from shared memory itself, once for all four warps (PTX ISA, asynchronous warpgroup level matrix
// instructions). Results lie in registers as those of mma do.
//
// A tile lies in blocks of 64 columns, rows of 128 bytes whose 16-byte pieces are swapped by the row's last three bits: the
// 128-byte swizzle, in which a tile can be read along its rows and across them.

#define TILE_BYTES (TILE * DIM * 2)
#define BLOCK_BYTES (TILE * 128)

__device__ __forceinline__ u32 place(int r, int piece) { return piece / 8 * BLOCK_BYTES + r * 128 + ((piece ^ r) & 7) * 16; }

// Shared memory from the first address that a swizzled tile may have.
__device__ __forceinline__ u32 swizzled_memory() {
    extern __shared__ bf16 shared[];
    return (shared_address(shared) + 1023) / 1024 * 1024;
}

// Rows [first, first + TILE) of an example; rows beyond the example are zero. A thread always has the same piece of a row, and rows
// a multiple of eight apart, so that the swizzle is the same in all of them.
__device__ __forceinline__ void load_swizzled(u32 to, const View& from, const Tile& t, int first) {
    constexpr int PIECES = DIM / 8, ROWS = THREADS / PIECES;
    int r = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const bf16* source = row(from, t.start + first + r) + piece * 8;
    u32 at = to + place(r, piece);
#pragma unroll
    for (int i = 0; i < TILE / ROWS; i++) {
        bool inside = first + r + i * ROWS < t.length;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at + i * ROWS * 128),
                     "l"(inside ? source + i * ROWS * from.ld : from.at), "r"(inside ? 16 : 0)
                     : "memory");
    }
}

// What cp.async and stores of this thread wrote becomes visible to wgmma.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ u64 descriptor(u32 at, u32 leading) {
    return (u64)(at >> 4 & 0x3fff) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// A tile with its columns as the inner dimension, columns [16 k, 16 k + 16).
__device__ __forceinline__ u64 along(u32 tile, int k) { return descriptor(tile + k / 4 * BLOCK_BYTES + k % 4 * 32, 16); }

// A tile with its rows as the inner dimension, rows [16 k, 16 k + 16).
__device__ __forceinline__ u64 across(u32 tile, int k) { return descriptor(tile + k * 2048, BLOCK_BYTES); }

#define FOUR(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SIXTEEN(d, n) FOUR(d, n), FOUR(d, n + 1), FOUR(d, n + 2), FOUR(d, n + 3)
#define ALL64(d) SIXTEEN(d, 0), SIXTEEN(d, 4)
#define ALL128(d) ALL64(d), SIXTEEN(d, 8), SIXTEEN(d, 12)
#define NAMES64 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES128 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// c (+)= a b^T of two tiles in shared memory, columns inside; `more` 0 begins a sum.
__device__ __forceinline__ void multiply(float c[8][4], u64 a, u64 b, int more) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES64 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                 : ALL64(c) : "l"(a), "l"(b), "r"(more));
}

// c += a b with a in registers, rows of b inside. What a holds is made anew for every product: NVRTC 13.0 lets other values
// take the place of registers that a loop reads again and again this way.
__device__ __forceinline__ void multiply_add(float c[DIM / 8][4], const u32 a[4], u64 b) {
#if DIM == 128
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES128 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}"
                 : ALL128(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES64 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}"
                 : ALL64(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

// Registers are as the code before says; products may begin.
__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N groups of products are in work; then `c` may be read.
template <int N, int COLUMNS>
__device__ __forceinline__ void done(float c[COLUMNS / 8][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++) asm volatile("" : FOUR(c, n)::"memory");
}

// A warp group's scores of 64 rows by TILE columns as the left side of a product.
struct Left {
    u32 a[TILE / 16][4];
};

__device__ __forceinline__ Left as_left(const float p[TILE / 8][4]) {
    Left left;
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) as_left(left.a[k], p[2 * k], p[2 * k + 1]);
    return left;
}

// Three blocks fit into a multiprocessor, so that one multiplies while another has its softmax: values have one place, and are
// on their way while scores are computed.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    attention(const Tile* tiles, const int* begins, View q, View k, View v, View out, float* lse, Shape s) {
    u32 ks = swizzled_memory(), vs = ks + 2 * TILE_BYTES, qs = vs + TILE_BYTES;
    Tile t = tiles[blockIdx.y];
    int h = blockIdx.x, mine = threadIdx.x / 32 * 16;
    View keys = head(k, h / s.share), values = head(v, h / s.share);
    int last = min(t.first + TILE, t.length);
    __shared__ int starts[TILE];  // [query]
    if (threadIdx.x < TILE) starts[threadIdx.x] = begin_of(begins, t, t.first + threadIdx.x);
    __syncthreads();

    int key = next_keys(t, begins_of(begins, t, t.first, TILE), 0, last, s.window), stage = 0;
    load_swizzled(qs, head(q, h), t, t.first);
    load_swizzled(ks, keys, t, key);
    commit();
    float o[DIM / 8][4] = {};
    Softmax softmax;
    while (key < last) {
        load_swizzled(vs, values, t, key);
        commit();
        int after = next_keys(t, begins_of(starts), key + TILE, last, s.window);
        if (after < last) load_swizzled(ks + (stage ^ 1) * TILE_BYTES, keys, t, after);
        commit();
        wait<2>();
        publish();
        __syncthreads();
        float p[TILE / 8][4];
        begin();
#pragma unroll
        for (int step = 0; step < KSTEPS; step++)
            multiply(p, along(qs, step), along(ks + stage * TILE_BYTES, step), step);
        end();
        done<0, TILE>(p);
        softmax.step(p, o, t, starts, mine, key, s);
        Left left = as_left(p);
        wait<1>();
        publish();
        __syncthreads();
        begin();
#pragma unroll
        for (int step = 0; step < TILE / 16; step++) multiply_add(o, left.a[step], across(vs, step));
        end();
        done<0, DIM>(o);
        __syncthreads();
        key = after;
        stage ^= 1;
    }
    softmax.finish(o, out, lse, t, mine, h, s);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_dq(const Tile* tiles, const int* begins, View q, View k, View v, View dout, const float* lse,
                 const float* delta, View dq, Shape s) {
    u32 ks = swizzled_memory(), vs = ks + 2 * TILE_BYTES, qs = vs + 2 * TILE_BYTES, ds = qs + TILE_BYTES;
    Tile t = tiles[blockIdx.y];
    int h = blockIdx.x, mine = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
    View keys = head(k, h / s.share), values = head(v, h / s.share);
    int last = min(t.first + TILE, t.length);
    __shared__ int starts[TILE];  // [query]
    if (threadIdx.x < TILE) starts[threadIdx.x] = begin_of(begins, t, t.first + threadIdx.x);
    __syncthreads();

    int key = next_keys(t, begins_of(begins, t, t.first, TILE), 0, last, s.window), stage = 0;
    load_swizzled(qs, head(q, h), t, t.first);
    load_swizzled(ds, head(dout, h), t, t.first);
    load_swizzled(ks, keys, t, key);
    load_swizzled(vs, values, t, key);
    commit();
    float logsum[2], pull[2];
    own_numbers(logsum, pull, lse, delta, t, mine, h, s);
    float sums[DIM / 8][4] = {}, scale = s.scale * LOG2E;
    while (key < last) {
        int after = next_keys(t, begins_of(starts), key + TILE, last, s.window);
        if (after < last) {
            load_swizzled(ks + (stage ^ 1) * TILE_BYTES, keys, t, after);
            load_swizzled(vs + (stage ^ 1) * TILE_BYTES, values, t, after);
        }
        commit();
        wait<1>();
        publish();
        __syncthreads();
        u32 kt = ks + stage * TILE_BYTES, vt = vs + stage * TILE_BYTES;
        float p[TILE / 8][4], dp[TILE / 8][4];
        begin();
#pragma unroll
        for (int step = 0; step < KSTEPS; step++) multiply(p, along(qs, step), along(kt, step), step);
        end();
#pragma unroll
        for (int step = 0; step < KSTEPS; step++) multiply(dp, along(ds, step), along(vt, step), step);
        end();
        done<1, TILE>(p);
        bool whole = all_visible(t, begins_of(starts), t.first, TILE, key, TILE, s.window);
#if SOFTCAP
        float slopes[TILE / 8][4];
#endif
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int from = t.first + mine + lane / 4 + i / 2 * 8, to = key + n * 8 + lane % 4 * 2 + i % 2;
                bool seen = whole || visible(t, starts[from - t.first], from, to, s.window);
                float slope = bend(p[n][i], s);
                p[n][i] = seen ? exp2_fast(p[n][i] * scale - logsum[i / 2]) : 0.f;
#if SOFTCAP
                slopes[n][i] = slope;
#endif
            }
        done<0, TILE>(dp);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[n][i] *= dp[n][i] - pull[i / 2];
#if SOFTCAP
                p[n][i] *= slopes[n][i];
#endif
            }
        Left left = as_left(p);
        begin();
#pragma unroll
        for (int step = 0; step < TILE / 16; step++) multiply_add(sums, left.a[step], across(kt, step));
        end();
        done<0, DIM>(sums);
        __syncthreads();
        key = after;
        stage ^= 1;
    }
    store<DIM>(head(dq, h), t, t.first + mine, 0, sums, s.scale, s.scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_dkv(const Tile* tiles, const int* begins, View q, View k, View v, View dout, const float* lse,
                  const float* delta, View dk, View dv, Shape s) {
    u32 qs = swizzled_memory(), ds = qs + 2 * TILE_BYTES, ks = ds + 2 * TILE_BYTES, vs = ks + TILE_BYTES;
    __shared__ float numbers[2][2][TILE];  // [stage][lse, delta][query]
    __shared__ int starts[2][TILE];         // [stage][query]
    // Tiles come in the order of the keys they see; the first keys are seen by most queries.
    Tile t = tiles[gridDim.y - 1 - blockIdx.y];
    int h = blockIdx.x, mine = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;

    auto next = [&](int query) {
        // Without a window, keys of the prompt are hidden from no query behind them.
        if (s.window == 0 && t.first + TILE <= t.prompt) return query;
        while (query < t.length &&
               none_visible(t, begins_of(begins, t, query, TILE), query, TILE, t.first, TILE, s.window))
            query += TILE;
        return query;
    };
    auto load = [&](int stage, int query) {
        load_swizzled(qs + stage * TILE_BYTES, head(q, h), t, query);
        load_swizzled(ds + stage * TILE_BYTES, head(dout, h), t, query);
        int i = threadIdx.x % TILE;
        bool first = threadIdx.x < TILE, inside = query + i < t.length;
        float number = inside ? (first ? lse : delta)[(long long)h * s.tokens + t.start + query + i] : 0.f;
        numbers[stage][first ? 0 : 1][i] = first ? number * LOG2E : number;
        if (first) starts[stage][i] = begin_of(begins, t, query + i);
    };
    load_swizzled(ks, head(k, h / s.share), t, t.first);
    load_swizzled(vs, head(v, h / s.share), t, t.first);
    int query = next(t.first), stage = 0;
    float dks[DIM / 8][4] = {}, dvs[DIM / 8][4] = {}, scale = s.scale * LOG2E;
    if (query < t.length) load(0, query);
    commit();
    while (query < t.length) {
        int after = next(query + TILE);
        if (after < t.length) load(stage ^ 1, after);
        commit();
        wait<1>();
        publish();
        __syncthreads();
        u32 qt = qs + stage * TILE_BYTES, dt = ds + stage * TILE_BYTES;
        float p[TILE / 8][4], dp[TILE / 8][4];
        begin();
#pragma unroll
        for (int step = 0; step < KSTEPS; step++) multiply(p, along(ks, step), along(qt, step), step);
        end();
#pragma unroll
        for (int step = 0; step < KSTEPS; step++) multiply(dp, along(vs, step), along(dt, step), step);
        end();
        done<1, TILE>(p);
        bool whole = all_visible(t, begins_of(starts[stage]), query, TILE, t.first, TILE, s.window);
#if SOFTCAP
        float slopes[TILE / 8][4];
#endif
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int at = n * 8 + lane % 4 * 2 + i % 2, to = t.first + mine + lane / 4 + i / 2 * 8;
                bool seen = whole || visible(t, starts[stage][at], query + at, to, s.window);
                float slope = bend(p[n][i], s);
                p[n][i] = seen ? exp2_fast(p[n][i] * scale - numbers[stage][0][at]) : 0.f;
#if SOFTCAP
                slopes[n][i] = slope;
#endif
            }
        Left weights = as_left(p);
        done<0, TILE>(dp);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[n][i] *= dp[n][i] - numbers[stage][1][n * 8 + lane % 4 * 2 + i % 2];
#if SOFTCAP
                p[n][i] *= slopes[n][i];
#endif
            }
        Left pulls = as_left(p);
        begin();
#pragma unroll
        for (int step = 0; step < TILE / 16; step++) {
            multiply_add(dvs, weights.a[step], across(dt, step));
            multiply_add(dks, pulls.a[step], across(qt, step));
        }
        end();
        done<0, DIM>(dvs);
        done<0, DIM>(dks);
        __syncthreads();
        query = after;
        stage ^= 1;
    }
    store<DIM>(head(dk, h), t, t.first + mine, 0, dks, s.scale, s.scale);
    store<DIM>(head(dv, h), t, t.first + mine, 0, dvs, 1.f, 1.f);
}
