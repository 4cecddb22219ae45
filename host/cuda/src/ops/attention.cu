// Causal grouped-query attention over packed examples, forward and backward, in tiles on the tensor cores (Dao 2023,
// FlashAttention-2, algorithms 1 and 2). An example lies as prompt | answer 1 | ... | answer k; a token sees the prompt and its
// own answer (ops/answer_mask.rs has the rule), and tiles that nobody sees are skipped. DIM is the width of a head of queries and keys,
// a multiple of 16, VALUE_DIM that of one of values, another one up to DIM; with SOFTCAP scores are bent before the softmax.
//
// Every sum is taken by one warp in a fixed order, so that two runs are equal bit for bit: the gradients of keys and of
// queries have a kernel each, and no atomics.

// Wide heads take smaller tiles, which fit into the shared memory of every card. The widest have kernels of their own
// (attention_wide.cu), in which four warps share a tile.
#define WIDEST (DIM > 256)
#define TILE (WIDEST ? 16 : DIM > 128 ? 32 : 64)
#define QUERIES (DIM > 128 ? 16 : 32)
#define THREADS (TILE * 2)
#define STRIDE (DIM + 8)  // 16 bytes of padding: the eight rows that ldmatrix reads fall into different banks
#define KSTEPS (DIM / 16)
#define OWN (WIDEST ? DIM / 4 : VALUE_DIM)  // columns of the output that a warp has; the widest heads have values as wide as keys
#define HELD (DIM <= 128)  // a warp holds its own rows in registers: shared memory is read for the other side alone

// A run of queries or of keys of one example: TILE of them at most.
struct Tile {
    int start;   // the example's first token in the row
    int first;   // the tile's first token in the example
    int prompt;  // tokens of the prompt
    int length;  // tokens of the example
};

struct Shape {
    int heads, share, tokens, window;  // `share` query heads read one key head; window 0 is none
    int cached;                        // tokens of the text before the rows of queries
    float scale, softcap;
};

// Whether a query whose answer begins at `begin` sees a key; places in the example. A query of the prompt has its end there.
__device__ __forceinline__ bool visible(const Tile& t, int begin, int query, int key, int window) {
    if (key > query || query >= t.length) return false;
    if (key >= t.prompt && key < begin) return false;
    if (window == 0) return true;
    // Answers between the prompt and the query's own have no part in its positions.
    int skipped = key < t.prompt ? begin - t.prompt : 0;
    return query - key - skipped < window;
}

// Where answers begin in a tile of queries: that of its first query, and of its last. In between they do not fall.
struct Begins {
    int first, last;
};

__device__ __forceinline__ Begins begins_of(const int* begins, const Tile& t, int query, int queries) {
    const int* of = begins + t.start;
    return {of[query], of[min(query + queries, t.length) - 1]};
}

// Those of a tile whose queries have theirs in shared memory, where they take no registers.
template <int N>
__device__ __forceinline__ Begins begins_of(const int (&starts)[N]) { return {starts[0], starts[N - 1]}; }

// Where the answer of a query begins; beyond the example, that of its last query.
__device__ __forceinline__ int begin_of(const int* begins, const Tile& t, int query) {
    return begins[t.start + min(query, t.length - 1)];
}

// Whether a whole tile of keys is seen by a whole tile of queries, and whether none of it is.
__device__ __forceinline__ bool all_visible(const Tile& t, Begins b, int query, int queries, int key, int keys, int window) {
    if (window > 0 || key + keys - 1 > query || query + queries > t.length) return false;
    return b.last <= t.prompt || key + keys <= t.prompt || key >= b.last;
}

__device__ __forceinline__ bool none_visible(const Tile& t, Begins b, int query, int queries, int key, int keys, int window) {
    if (key > query + queries - 1) return true;
    if (key >= t.prompt && key + keys <= b.first) return true;
    // Positions are no further apart than places, less the answers between.
    return window > 0 && query - (key + keys - 1) - (b.last - t.prompt) >= window;
}

__device__ __forceinline__ void ldmatrix(u32 r[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}

__device__ __forceinline__ void ldmatrix_transposed(u32 r[4], const bf16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)));
}

// c += a b: a is 16 by 16, b 16 by 8.
__device__ __forceinline__ void mma(float c[4], const u32 a[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rows [first, first + ROWS) of an example into shared memory; rows beyond the example are zero.
template <int ROWS, int COLUMNS = DIM>
__device__ __forceinline__ void load_tile(bf16* to, const View& from, const Tile& t, int first) {
    for (int i = threadIdx.x; i < ROWS * (COLUMNS / 8); i += blockDim.x) {
        int r = i / (COLUMNS / 8), c = i % (COLUMNS / 8) * 8;
        bool inside = first + r < t.length;
        const bf16* source = row(from, t.start + (inside ? first + r : 0)) + c;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to + r * STRIDE + c)),
                     "l"(source), "r"(inside ? 16 : 0));
    }
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int N>
__device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

// The 16 rows from `row` of a tile as the left side of a product, columns [16 k, 16 k + 16).
__device__ __forceinline__ void left(u32 a[4], const bf16* tile, int row, int k) {
    int lane = threadIdx.x % 32;
    ldmatrix(a, shared_address(tile + (row + lane % 16) * STRIDE + k * 16 + lane / 16 * 8));
}

// A warp's own 16 rows as the left side, over all columns of a head.
template <int COLUMNS = DIM>
struct Rows {
#if HELD
    u32 a[COLUMNS / 16][4];
#else
    const bf16* tile;
    int row;
#endif
};

template <int COLUMNS = DIM>
__device__ __forceinline__ Rows<COLUMNS> hold(const bf16* tile, int row) {
    Rows<COLUMNS> rows;
#if HELD
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) left(rows.a[k], tile, row, k);
#else
    rows.tile = tile;
    rows.row = row;
#endif
    return rows;
}

// Sixteen rows of a tile as columns of the right side: b[0], b[1] for the first eight, b[2], b[3] for the others.
__device__ __forceinline__ void right(u32 b[4], const bf16* tile, int row, int k) {
    int lane = threadIdx.x % 32;
    ldmatrix(b, shared_address(tile + (row + lane % 8 + lane / 16 * 8) * STRIDE + k * 16 + lane / 8 % 2 * 8));
}

// Sixteen rows of a tile as rows of the right side, columns [16 n, 16 n + 16): b[0], b[1] for the first eight columns.
__device__ __forceinline__ void right_rows(u32 b[4], const bf16* tile, int row, int n) {
    int lane = threadIdx.x % 32;
    ldmatrix_transposed(b, tile + (row + lane % 16) * STRIDE + n * 16 + lane / 16 * 8);
}

// Two neighbouring products of 16 by 8 as the left side of the next: rows stay, columns become the inner dimension.
__device__ __forceinline__ void as_left(u32 a[4], const float x[4], const float y[4]) {
    a[0] = pack(x[0], x[1]);
    a[1] = pack(x[2], x[3]);
    a[2] = pack(y[0], y[1]);
    a[3] = pack(y[2], y[3]);
}

// c += own rows times N rows of `b`, over all columns of a head.
template <int N, int COLUMNS>
__device__ __forceinline__ void products(float c[N / 8][4], const Rows<COLUMNS>& own, const bf16* b) {
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) {
        u32 r[4];
#if HELD
        const u32* l = own.a[k];
#else
        u32 l[4];
        left(l, own.tile, own.row, k);
#endif
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            right(r, b, n * 16, k);
            mma(c[2 * n], l, r[0], r[1]);
            mma(c[2 * n + 1], l, r[2], r[3]);
        }
    }
}

// c += p times rows of `b`: p is 16 by N in registers, c 16 by COLUMNS, from column block `from`.
template <int N, int COLUMNS>
__device__ __forceinline__ void accumulate(float c[COLUMNS / 8][4], const float p[N / 8][4], const bf16* b, int from) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        u32 l[4], r[4];
        as_left(l, p[2 * k], p[2 * k + 1]);
#pragma unroll
        for (int n = 0; n < COLUMNS / 16; n++) {
            right_rows(r, b, k * 16, from + n);
            mma(c[2 * n], l, r[0], r[1]);
            mma(c[2 * n + 1], l, r[2], r[3]);
        }
    }
}

// Rows of an accumulator to a value.
template <int COLUMNS>
__device__ __forceinline__ void store(const View& to, const Tile& t, int first, int column, const float c[COLUMNS / 8][4],
                                      float scale_low, float scale_high) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int at = first + lane / 4 + half * 8;
        if (at >= t.length) continue;
        float scale = half ? scale_high : scale_low;
        bf16* out = row(to, t.start + at) + column + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
            *(u32*)(out + n * 8) = pack(c[n][2 * half] * scale, c[n][2 * half + 1] * scale);
    }
}

template <int COLUMNS = DIM>
__device__ __forceinline__ View head(const View& v, int h) { return {v.at + (long long)h * COLUMNS, v.ld}; }

__device__ __forceinline__ View value_head(const View& v, int h) { return head<VALUE_DIM>(v, h); }

#define LOG2E 1.44269504f

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// With a soft cap, the product of a query and a key becomes that of the bent score, softcap tanh(score / softcap); returns
// the slope, 1 - tanh^2 (Gemma 2, section 2).
__device__ __forceinline__ float bend(float& product, const Shape& s) {
#if SOFTCAP
    // tanh by its exponential: tanh.approx has too few bits for a score of softcap times it.
    float t = 1.f - __fdividef(2.f, 1.f + exp2_fast(2.f * LOG2E * product * s.scale / s.softcap));
    product = t * s.softcap / s.scale;
    return 1.f - t * t;
#else
    return 1.f;
#endif
}

// The log-sum of a row's weights, whose scores were taken less `max`, and the factor on what they summed of values. A sink is a logit of a
// head that joins the sum and has no value.
struct Total {
    float log_sum, by;

    __device__ __forceinline__ Total(float max, float sum, const bf16* sinks, int h) : log_sum(max + logf(sum)), by(1.f / sum) {
        if (!sinks) return;
        float sink = to_float(sinks[h]), own = log_sum;
        log_sum = fmaxf(own, sink) + log1pf(__expf(-fabsf(own - sink)));
        by *= __expf(own - log_sum);
    }
};

// The first tile of keys from `key` on that queries of the tile see; at least `last` if there is none.
__device__ __forceinline__ int next_keys(const Tile& t, Begins b, int key, int last, int window) {
    while (key < last && none_visible(t, b, t.first, TILE, key, TILE, window)) key += TILE;
    return key;
}

// The softmax of a warp's 16 rows, a tile of keys after the other.
struct Softmax {
    float max[2] = {-1e30f, -1e30f}, sum[2] = {};

    // Scores `p` become weights, and what was summed in `o` shrinks to the new maximum.
    __device__ __forceinline__ void step(float p[TILE / 8][4], float o[OWN / 8][4], const Tile& t,
                                         const int (&starts)[TILE], int mine, int key, const Shape& s) {
        int lane = threadIdx.x % 32;
        float scale = s.scale * LOG2E;
        bool whole = all_visible(t, begins_of(starts), t.first, TILE, key, TILE, s.window);
        float top[2] = {max[0], max[1]}, shift[2];
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) bend(p[n][i], s);
        // A branch of its own: most tiles are seen whole, and then this costs nothing.
        if (!whole) {
            int own = mine + lane / 4, begins[2] = {starts[own], starts[own + 8]};
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int from = t.first + own + i / 2 * 8, to = key + n * 8 + lane % 4 * 2 + i % 2;
                    if (!visible(t, begins[i / 2], from, to, s.window)) p[n][i] = -1e30f;
                }
        }
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) top[i / 2] = fmaxf(top[i / 2], p[n][i]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
            // A row that has seen nothing yet has no maximum to subtract.
            shift[r] = top[r] <= -1e30f ? 0.f : top[r] * scale;
            float shrink = exp2_fast((max[r] - top[r]) * scale);
            max[r] = top[r];
            sum[r] *= shrink;
#pragma unroll
            for (int n = 0; n < OWN / 8; n++) {
                o[n][2 * r] *= shrink;
                o[n][2 * r + 1] *= shrink;
            }
        }
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[n][i] = exp2_fast(p[n][i] * scale - shift[i / 2]);
                sum[i / 2] += p[n][i];
            }
    }

    // Leaves a warp's columns of the output, from `column` on, and with the first ones the log-sums.
    __device__ __forceinline__ void finish(float o[OWN / 8][4], const View& out, float* lse, const bf16* sinks, const Tile& t,
                                           int mine, int h, const Shape& s, int column = 0) {
        int lane = threadIdx.x % 32;
        float by[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
            int at = t.first + mine + lane / 4 + r * 8;
            Total total(max[r] * s.scale, sum[r], sinks, h);
            by[r] = total.by;
            if (column == 0 && lane % 4 == 0 && at < t.length) lse[(long long)h * s.tokens + t.start + at] = total.log_sum;
        }
        store<OWN>(value_head(out, h), t, t.first + mine, column, o, by[0], by[1]);
    }
};

// Log-sums, in powers of two, and deltas of a thread's two rows.
__device__ __forceinline__ void own_numbers(float logsum[2], float pull[2], const float* lse, const float* delta,
                                            const Tile& t, int mine, int h, const Shape& s) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int at = t.first + mine + threadIdx.x % 32 / 4 + r * 8;
        long long place = (long long)h * s.tokens + t.start + at;
        logsum[r] = at < t.length ? lse[place] * LOG2E : 0.f;
        pull[r] = at < t.length ? delta[place] : 0.f;
    }
}

// delta = sum of dout * out over a head, [heads, tokens]; a warp a token and head.
extern "C" __global__ void attention_delta(View out, View dout, float* delta, int tokens, int heads) {
    long long at = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (at >= (long long)tokens * heads) return;
    long long token = at / heads, h = at % heads;
    float sum = 0.f;
    for (int i = threadIdx.x * 8; i < VALUE_DIM; i += 256) {
        Eight a = load8(row(out, token) + h * VALUE_DIM + i), b = load8(row(dout, token) + h * VALUE_DIM + i);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += a.v[j] * b.v[j];
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) delta[h * tokens + token] = sum;
}

#if !WGMMA && !WIDEST  // see attention_hopper.cu, attention_wide.cu

// out = softmax(scale q k^T) v and lse = ln sum exp, [heads, tokens]. A block a head and a tile of queries, a warp 16 rows.
extern "C" __global__ void __launch_bounds__(THREADS, DIM <= 128 ? 3 : 2)
    attention(const Tile* tiles, const int* begins, View q, View k, View v, View out, float* lse, const bf16* sinks, Shape s) {
    extern __shared__ bf16 shared[];
    bf16 *ks = shared, *vs = ks + 2 * TILE * STRIDE;
    // Held rows pass through the second stage before it is used.
    bf16* qs = HELD ? ks + TILE * STRIDE : vs + 2 * TILE * STRIDE;
    Tile t = tiles[blockIdx.y];
    int h = blockIdx.x, mine = threadIdx.x / 32 * 16;
    View keys = head(k, h / s.share), values = value_head(v, h / s.share);
    int last = min(t.first + TILE, t.length);
    __shared__ int starts[TILE];  // [query]
    if (threadIdx.x < TILE) starts[threadIdx.x] = begin_of(begins, t, t.first + threadIdx.x);

    load_tile<TILE>(qs, head(q, h), t, t.first);
    commit();
    int key = next_keys(t, begins_of(begins, t, t.first, TILE), 0, last, s.window), stage = 0;
    load_tile<TILE>(ks, keys, t, key);
    load_tile<TILE, VALUE_DIM>(vs, values, t, key);
    commit();
    wait<1>();
    __syncthreads();
    Rows<> own = hold(qs, mine);
    if (HELD) __syncthreads();

    float o[VALUE_DIM / 8][4] = {};
    Softmax softmax;
    while (key < last) {
        int after = next_keys(t, begins_of(starts), key + TILE, last, s.window);
        if (after < last) {
            load_tile<TILE>(ks + (stage ^ 1) * TILE * STRIDE, keys, t, after);
            load_tile<TILE, VALUE_DIM>(vs + (stage ^ 1) * TILE * STRIDE, values, t, after);
        }
        commit();
        wait<1>();
        __syncthreads();
        float p[TILE / 8][4] = {};
        products<TILE>(p, own, ks + stage * TILE * STRIDE);
        softmax.step(p, o, t, starts, mine, key, s);
        accumulate<TILE, VALUE_DIM>(o, p, vs + stage * TILE * STRIDE, 0);
        __syncthreads();
        key = after;
        stage ^= 1;
    }
    softmax.finish(o, out, lse, sinks, t, mine, h, s);
}

// dq, a block a head and a tile of queries. Where values have one stage only (V_STAGES), a tile of them comes while the block waits.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_dq(const Tile* tiles, const int* begins, View q, View k, View v, View dout, const float* lse,
                 const float* delta, View dq, Shape s) {
    extern __shared__ bf16 shared[];
    bf16 *ks = shared, *vs = ks + 2 * TILE * STRIDE;
    bf16 *qs = HELD ? ks + TILE * STRIDE : vs + V_STAGES * TILE * STRIDE, *ds = HELD ? vs + TILE * STRIDE : qs + TILE * STRIDE;
    Tile t = tiles[blockIdx.y];
    int h = blockIdx.x, mine = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
    View keys = head(k, h / s.share), values = value_head(v, h / s.share);
    int last = min(t.first + TILE, t.length);
    __shared__ int starts[TILE];  // [query]
    if (threadIdx.x < TILE) starts[threadIdx.x] = begin_of(begins, t, t.first + threadIdx.x);

    load_tile<TILE>(qs, head(q, h), t, t.first);
    load_tile<TILE, VALUE_DIM>(ds, value_head(dout, h), t, t.first);
    commit();
    int key = next_keys(t, begins_of(begins, t, t.first, TILE), 0, last, s.window), stage = 0;
    load_tile<TILE>(ks, keys, t, key);
    if (V_STAGES == 2) load_tile<TILE, VALUE_DIM>(vs, values, t, key);
    commit();
    wait<1>();
    __syncthreads();
    Rows<> own = hold(qs, mine);
    Rows<VALUE_DIM> pushed = hold<VALUE_DIM>(ds, mine);
    if (HELD) __syncthreads();

    float logsum[2], pull[2];
    own_numbers(logsum, pull, lse, delta, t, mine, h, s);
    float out[DIM / 8][4] = {}, scale = s.scale * LOG2E;
    while (key < last) {
        int after = next_keys(t, begins_of(starts), key + TILE, last, s.window);
        if (V_STAGES == 1) {
            load_tile<TILE, VALUE_DIM>(vs, values, t, key);
            commit();
        }
        if (after < last) {
            load_tile<TILE>(ks + (stage ^ 1) * TILE * STRIDE, keys, t, after);
            if (V_STAGES == 2) load_tile<TILE, VALUE_DIM>(vs + (stage ^ 1) * TILE * STRIDE, values, t, after);
        }
        commit();
        wait<1>();
        __syncthreads();
        bool whole = all_visible(t, begins_of(starts), t.first, TILE, key, TILE, s.window);
        // Half a tile of keys at a time keeps scores and their gradient in registers.
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const bf16* kt = ks + (stage * TILE + part * TILE / 2) * STRIDE;
            const bf16* vt = vs + (stage * (V_STAGES - 1) * TILE + part * TILE / 2) * STRIDE;
            float p[TILE / 16][4] = {}, dp[TILE / 16][4] = {};
            products<TILE / 2>(p, own, kt);
            products<TILE / 2>(dp, pushed, vt);
#pragma unroll
            for (int n = 0; n < TILE / 16; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int from = t.first + mine + lane / 4 + i / 2 * 8;
                    int to = key + part * TILE / 2 + n * 8 + lane % 4 * 2 + i % 2;
                    bool seen = whole || visible(t, starts[from - t.first], from, to, s.window);
                    float slope = bend(p[n][i], s);
                    float weight = seen ? exp2_fast(p[n][i] * scale - logsum[i / 2]) : 0.f;
                    p[n][i] = weight * (dp[n][i] - pull[i / 2]) * slope;
                }
            accumulate<TILE / 2, DIM>(out, p, kt, 0);
        }
        __syncthreads();
        key = after;
        stage ^= 1;
    }
    store<DIM>(head(dq, h), t, t.first + mine, 0, out, s.scale, s.scale);
}

// Wide heads take their columns in two halves, so that the sums stay in registers.
#define KEY_COLUMNS (DIM > 128 ? DIM / 2 : DIM)
#define VALUE_COLUMNS (DIM > 128 ? VALUE_DIM / 2 : VALUE_DIM)

// What a query head gives to dk and dv of its key head, [tokens, heads * DIM] and of VALUE_DIM; a block a head, a tile of keys and half
// of the columns of a wide head. A warp has 16 keys.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_dkv(const Tile* tiles, const int* begins, View q, View k, View v, View dout, const float* lse,
                  const float* delta, View dk, View dv, Shape s) {
    extern __shared__ bf16 shared[];
    bf16 *qs = shared, *ds = qs + 2 * QUERIES * STRIDE;
    float* numbers = (float*)(ds + 2 * QUERIES * STRIDE);  // [2 stages][lse, delta][QUERIES]
    __shared__ int starts[2][QUERIES];                      // [stage][query]
    // Held rows pass through the stages, which together have as many rows.
    bf16 *ks = HELD ? qs : (bf16*)(numbers + 4 * QUERIES), *vs = HELD ? ds : ks + TILE * STRIDE;
    // Tiles come in the order of the keys they see; the first keys are seen by most queries.
    Tile t = tiles[gridDim.y - 1 - blockIdx.y];
    int h = blockIdx.x, mine = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
    int of_key = blockIdx.z * (KEY_COLUMNS / 16), of_value = blockIdx.z * (VALUE_COLUMNS / 16);
    load_tile<TILE>(ks, head(k, h / s.share), t, t.first);
    load_tile<TILE, VALUE_DIM>(vs, value_head(v, h / s.share), t, t.first);
    commit();
    wait<0>();
    __syncthreads();
    Rows<> own = hold(ks, mine);
    Rows<VALUE_DIM> weighted = hold<VALUE_DIM>(vs, mine);
    if (HELD) __syncthreads();

    auto next = [&](int query) {
        // Without a window, keys of the prompt are hidden from no query behind them.
        if (s.window == 0 && t.first + TILE <= t.prompt) return query;
        while (query < t.length &&
               none_visible(t, begins_of(begins, t, query, QUERIES), query, QUERIES, t.first, TILE, s.window))
            query += QUERIES;
        return query;
    };
    auto load = [&](int stage, int query) {
        load_tile<QUERIES>(qs + stage * QUERIES * STRIDE, head(q, h), t, query);
        load_tile<QUERIES, VALUE_DIM>(ds + stage * QUERIES * STRIDE, value_head(dout, h), t, query);
        if (threadIdx.x < 2 * QUERIES) {
            int i = threadIdx.x % QUERIES;
            bool first = threadIdx.x < QUERIES, inside = query + i < t.length;
            float number = inside ? (first ? lse : delta)[(long long)h * s.tokens + t.start + query + i] : 0.f;
            numbers[stage * 2 * QUERIES + threadIdx.x] = first ? number * LOG2E : number;
            if (first) starts[stage][i] = begin_of(begins, t, query + i);
        }
    };
    int query = next(t.first / QUERIES * QUERIES), stage = 0;
    float dks[KEY_COLUMNS / 8][4] = {}, dvs[VALUE_COLUMNS / 8][4] = {}, scale = s.scale * LOG2E;
    if (query < t.length) load(0, query);
    commit();
    while (query < t.length) {
        int after = next(query + QUERIES);
        if (after < t.length) load(stage ^ 1, after);
        commit();
        wait<1>();
        __syncthreads();
        const bf16 *qt = qs + stage * QUERIES * STRIDE, *dt = ds + stage * QUERIES * STRIDE;
        const float* of = numbers + stage * 2 * QUERIES;
        bool whole = all_visible(t, begins_of(starts[stage]), query, QUERIES, t.first, TILE, s.window);
#pragma unroll
        for (int part = 0; part < QUERIES; part += 16) {
            float p[2][4] = {}, dp[2][4] = {};
            products<16>(p, own, qt + part * STRIDE);
            products<16>(dp, weighted, dt + part * STRIDE);
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int at = part + n * 8 + lane % 4 * 2 + i % 2, to = t.first + mine + lane / 4 + i / 2 * 8;
                    bool seen = whole || visible(t, starts[stage][at], query + at, to, s.window);
                    float slope = bend(p[n][i], s);
                    float weight = seen ? exp2_fast(p[n][i] * scale - of[at]) : 0.f;
                    p[n][i] = weight;
                    dp[n][i] = weight * (dp[n][i] - of[QUERIES + at]) * slope;
                }
            accumulate<16, VALUE_COLUMNS>(dvs, p, dt + part * STRIDE, of_value);
            accumulate<16, KEY_COLUMNS>(dks, dp, qt + part * STRIDE, of_key);
        }
        __syncthreads();
        query = after;
        stage ^= 1;
    }
    store<KEY_COLUMNS>(head(dk, h), t, t.first + mine, of_key * 16, dks, s.scale, s.scale);
    store<VALUE_COLUMNS>(value_head(dv, h), t, t.first + mine, of_value * 16, dvs, 1.f, 1.f);
}

#endif
