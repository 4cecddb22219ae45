// Attention for heads of more than 256 columns, as in attention.cu but for who multiplies: the four warps of a block have 16 queries
// (or keys) together and a quarter of the columns each. A warp's quarter of the columns gives a part of every score; all parts are
// summed through shared memory, in the same order by every warp, so that each has the whole scores for its columns of the output.

#define WARPS 4
#define PARTS (WARPS * TILE * TILE)  // numbers of one product's parts: [warp][accumulator][lane]

__device__ __forceinline__ int warp_of() { return threadIdx.x / 32; }

// A warp's part of 16 rows of `a` times 16 rows of `b`: the sum over its own columns.
__device__ __forceinline__ void partial(float c[2][4], const bf16* a, const bf16* b) {
#pragma unroll
    for (int k = 0; k < OWN / 16; k++) {
        u32 l[4], r[4];
        left(l, a, 0, warp_of() * (OWN / 16) + k);
        right(r, b, 0, warp_of() * (OWN / 16) + k);
        mma(c[0], l, r[0], r[1]);
        mma(c[1], l, r[2], r[3]);
    }
}

__device__ __forceinline__ void give(float* parts, const float c[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) parts[(warp_of() * 8 + i) * 32 + threadIdx.x % 32] = c[i / 4][i % 4];
}

// Once all warps have given theirs.
__device__ __forceinline__ void take(float c[2][4], const float* parts) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float sum = 0.f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += parts[(warp * 8 + i) * 32 + threadIdx.x % 32];
        c[i / 4][i % 4] = sum;
    }
}

// A block a head and a tile of queries.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    attention(const Tile* tiles, const int* begins, View q, View k, View v, View out, float* lse, const bf16* sinks, Shape s) {
    extern __shared__ bf16 shared[];
    bf16 *qs = shared, *ks = qs + TILE * STRIDE, *vs = ks + TILE * STRIDE;
    float* parts = (float*)(vs + TILE * STRIDE);
    Tile t = tiles[blockIdx.y];
    int h = blockIdx.x;
    View keys = head(k, h / s.share), values = head(v, h / s.share);
    int last = min(t.first + TILE, t.length);
    __shared__ int starts[TILE];  // [query]
    if (threadIdx.x < TILE) starts[threadIdx.x] = begin_of(begins, t, t.first + threadIdx.x);

    load_tile<TILE>(qs, head(q, h), t, t.first);
    int key = next_keys(t, begins_of(begins, t, t.first, TILE), 0, last, s.window);
    float o[OWN / 8][4] = {};
    Softmax softmax;
    while (key < last) {
        load_tile<TILE>(ks, keys, t, key);
        commit();
        load_tile<TILE>(vs, values, t, key);
        commit();
        wait<1>();
        __syncthreads();
        float p[2][4] = {};
        partial(p, qs, ks);
        give(parts, p);
        wait<0>();
        __syncthreads();
        take(p, parts);
        softmax.step(p, o, t, starts, 0, key, s);
        accumulate<TILE, OWN>(o, p, vs, warp_of() * (OWN / 16));
        __syncthreads();
        key = next_keys(t, begins_of(starts), key + TILE, last, s.window);
    }
    softmax.finish(o, out, lse, sinks, t, 0, h, s, warp_of() * OWN);
}

// dq, a block a head and a tile of queries.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    attention_dq(const Tile* tiles, const int* begins, View q, View k, View v, View dout, const float* lse,
                 const float* delta, View dq, Shape s) {
    extern __shared__ bf16 shared[];
    bf16 *qs = shared, *ds = qs + TILE * STRIDE, *ks = ds + TILE * STRIDE, *vs = ks + TILE * STRIDE;
    float* parts = (float*)(vs + TILE * STRIDE);
    Tile t = tiles[blockIdx.y];
    int h = blockIdx.x, lane = threadIdx.x % 32;
    View keys = head(k, h / s.share), values = head(v, h / s.share);
    int last = min(t.first + TILE, t.length);
    __shared__ int starts[TILE];  // [query]
    if (threadIdx.x < TILE) starts[threadIdx.x] = begin_of(begins, t, t.first + threadIdx.x);

    load_tile<TILE>(qs, head(q, h), t, t.first);
    load_tile<TILE>(ds, head(dout, h), t, t.first);
    int key = next_keys(t, begins_of(begins, t, t.first, TILE), 0, last, s.window);
    float logsum[2], pull[2];
    own_numbers(logsum, pull, lse, delta, t, 0, h, s);
    float sums[OWN / 8][4] = {}, scale = s.scale * LOG2E;
    while (key < last) {
        load_tile<TILE>(ks, keys, t, key);
        load_tile<TILE>(vs, values, t, key);
        commit();
        wait<0>();
        __syncthreads();
        float p[2][4] = {}, dp[2][4] = {};
        partial(p, qs, ks);
        partial(dp, ds, vs);
        give(parts, p);
        give(parts + PARTS, dp);
        __syncthreads();
        take(p, parts);
        take(dp, parts + PARTS);
        bool whole = all_visible(t, begins_of(starts), t.first, TILE, key, TILE, s.window);
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int from = t.first + lane / 4 + i / 2 * 8, to = key + n * 8 + lane % 4 * 2 + i % 2;
                bool seen = whole || visible(t, starts[from - t.first], from, to, s.window);
                float slope = bend(p[n][i], s);
                float weight = seen ? exp2_fast(p[n][i] * scale - logsum[i / 2]) : 0.f;
                p[n][i] = weight * (dp[n][i] - pull[i / 2]) * slope;
            }
        accumulate<TILE, OWN>(sums, p, ks, warp_of() * (OWN / 16));
        __syncthreads();
        key = next_keys(t, begins_of(starts), key + TILE, last, s.window);
    }
    store<OWN>(head(dq, h), t, t.first, warp_of() * OWN, sums, s.scale, s.scale);
}

// What a query head gives to dk and dv of its key head, [tokens, heads * DIM] each; a block a head and a tile of keys.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    attention_dkv(const Tile* tiles, const int* begins, View q, View k, View v, View dout, const float* lse,
                  const float* delta, View dk, View dv, Shape s) {
    extern __shared__ bf16 shared[];
    bf16 *ks = shared, *vs = ks + TILE * STRIDE, *qs = vs + TILE * STRIDE, *ds = qs + QUERIES * STRIDE;
    float* parts = (float*)(ds + QUERIES * STRIDE);
    __shared__ float logsums[QUERIES], pulls[QUERIES];
    __shared__ int starts[QUERIES];
    // Tiles come in the order of the keys they see; the first keys are seen by most queries.
    Tile t = tiles[gridDim.y - 1 - blockIdx.y];
    int h = blockIdx.x, lane = threadIdx.x % 32, own = warp_of() * (OWN / 16);
    load_tile<TILE>(ks, head(k, h / s.share), t, t.first);
    load_tile<TILE>(vs, head(v, h / s.share), t, t.first);

    auto next = [&](int query) {
        // Without a window, keys of the prompt are hidden from no query behind them.
        if (s.window == 0 && t.first + TILE <= t.prompt) return query;
        while (query < t.length &&
               none_visible(t, begins_of(begins, t, query, QUERIES), query, QUERIES, t.first, TILE, s.window))
            query += QUERIES;
        return query;
    };
    float dks[OWN / 8][4] = {}, dvs[OWN / 8][4] = {}, scale = s.scale * LOG2E;
    for (int query = next(t.first / QUERIES * QUERIES); query < t.length; query = next(query + QUERIES)) {
        load_tile<QUERIES>(qs, head(q, h), t, query);
        load_tile<QUERIES>(ds, head(dout, h), t, query);
        commit();
        if (threadIdx.x < QUERIES) {
            int at = query + threadIdx.x;
            long long place = (long long)h * s.tokens + t.start + at;
            logsums[threadIdx.x] = at < t.length ? lse[place] * LOG2E : 0.f;
            pulls[threadIdx.x] = at < t.length ? delta[place] : 0.f;
            starts[threadIdx.x] = begin_of(begins, t, at);
        }
        wait<0>();
        __syncthreads();
        float p[2][4] = {}, dp[2][4] = {};
        partial(p, ks, qs);
        partial(dp, vs, ds);
        give(parts, p);
        give(parts + PARTS, dp);
        __syncthreads();
        take(p, parts);
        take(dp, parts + PARTS);
        bool whole = all_visible(t, begins_of(starts), query, QUERIES, t.first, TILE, s.window);
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int at = n * 8 + lane % 4 * 2 + i % 2, to = t.first + lane / 4 + i / 2 * 8;
                bool seen = whole || visible(t, starts[at], query + at, to, s.window);
                float slope = bend(p[n][i], s);
                float weight = seen ? exp2_fast(p[n][i] * scale - logsums[at]) : 0.f;
                p[n][i] = weight;
                dp[n][i] = weight * (dp[n][i] - pulls[at]) * slope;
            }
        accumulate<16, OWN>(dvs, p, ds, own);
        accumulate<16, OWN>(dks, dp, qs, own);
        __syncthreads();
    }
    store<OWN>(head(dk, h), t, t.first, own * 16, dks, s.scale, s.scale);
    store<OWN>(head(dv, h), t, t.first, own * 16, dvs, 1.f, 1.f);
}
