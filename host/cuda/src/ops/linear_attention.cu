// Linear attention with a decaying state, in chunks: the gated delta rule (Yang et al. 2024, "Gated Delta Networks", section 3.3) where
// SOLVES holds, else the state space of Mamba 2 (Dao and Gu 2024, "Transformers are SSMs", section 6). Of a head, with S [key, value] before a
// chunk, G_i the sum of the log decays up to token i, and sums over tokens j that i sees:
//
//   v'_i = beta_i (v_i - e^G_i S^T k_i - sum_{j<i} e^(G_i - G_j) (k_i k_j) v'_j)     what token i writes; v_i in a state space
//   o_i  = e^G_i S^T q_i + sum_{j<=i} e^(G_i - G_j) (q_i k_j) v'_j                   and D v_i in a state space
//   S'   = e^G_end S + sum_j e^(G_end - G_j) k_j v'_j^T
//
// Keys and queries are multiplied with factors, which enter where they are read: one over their lengths in the delta rule, in a state
// space the time step of a key. `recurrence_chunks` makes of every chunk, all at once, the matrix that solves the first line,
// v' = P (v - e^G S^T k), and that of the second one's sum. The others walk along an example: a warp has 16 columns of values, and keeps
// S^T of them in registers as the tensor cores leave it, which is how they take it again. What they read and write is transposed alike: a
// warp needs nothing of another one.
//
// KEY and VALUE are the columns of heads, STAGES tiles are in shared memory at once.

#define COLUMNS (VALUE % 64 == 0 ? 64 : 32)

struct Rule {
    const float *a_log, *dt_bias, *skip;
    // Value heads of a key head; tokens of the batch.
    int heads, share, tokens;
    // What is added to sums of squares; what time steps are clamped to.
    float eps, least, most;
};

__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// Of what a token of a chunk sees. What it does not see has the log decay HIDDEN, so that a factor is computed without a branch.
#define HIDDEN -1e9f

__device__ __forceinline__ bool sees(const Chunk& c, int begin, int i, int j) {
    return (j <= i) & ((c.first + j < c.prompt) | (c.first + j >= begin));
}

// Tiles of a chunk in shared memory, and of every token what S^T q, S^T k and k are multiplied with.
#define SQUARE (CHUNK * CHUNK * 2)
#define KEYS (tile_bytes<KEY>(CHUNK))
#define STAGE (2 * KEYS + (1 + SOLVES) * SQUARE + tile_bytes<COLUMNS>(CHUNK))

struct Stage {
    u32 q, k, solve, scores, values;
};

__device__ __forceinline__ Stage stage(u32 from, int which) {
    u32 at = from + which * STAGE;
    u32 scores = at + 2 * KEYS + SOLVES * SQUARE;
    return {at, at + KEYS, at + 2 * KEYS, scores, scores + SQUARE};
}

// What a walk reads.
struct Reads {
    View q, k, v, solve, scores;
    const float *decays, *q_norms, *k_norms;
};

struct __align__(16) Factors {
    float of_q[CHUNK], of_k[CHUNK], of_update[CHUNK], end;
};

// Starts copying a chunk's tiles.
template <bool ALL>
__device__ __forceinline__ void fetch(const Stage& to, const Chunk& c, const Reads& from, const Rule& d, int head, int column) {
    int of_key = head / d.share;
    if (ALL) copy_tile<KEY, CHUNK>(to.q, row(from.q, c.row) + of_key * KEY, from.q.ld, c.rows);
    copy_tile<KEY, CHUNK>(to.k, row(from.k, c.row) + of_key * KEY, from.k.ld, c.rows);
    if (SOLVES) copy_tile<CHUNK, CHUNK>(to.solve, row(from.solve, c.row) + head * CHUNK, from.solve.ld, c.rows);
    if (ALL) copy_tile<CHUNK, CHUNK>(to.scores, row(from.scores, c.row) + head * CHUNK, from.scores.ld, c.rows);
    copy_tile<COLUMNS, CHUNK>(to.values, row(from.v, c.row) + head * VALUE + column, from.v.ld, c.rows);
}

// A thread's part of a chunk's numbers, on their way from the GPU's memory: sums of log decays, and norms.
struct Numbers {
    float decay, end, q_norm, k_norm;
};

__device__ __forceinline__ Numbers numbers(const Chunk& c, const Reads& from, const Rule& d, int head) {
    int t = threadIdx.x;
    if (t >= c.rows || t >= CHUNK) return {};
    long long at = (long long)head * d.tokens + c.row;
    return {from.decays[at + t], from.decays[at + c.rows - 1], from.q_norms[at + t], from.k_norms[at + t]};
}

__device__ __forceinline__ void factors(const Numbers& n, Factors& to) {
    int t = threadIdx.x;
    if (t >= CHUNK) return;
    float decay = expf(n.decay);
    to.of_q[t] = decay * n.q_norm;
    to.of_k[t] = decay * n.k_norm;
    to.of_update[t] = expf(n.end - n.decay) * n.k_norm;
    if (t == 0) to.end = expf(n.end);
}

// S^T: 16 columns of values, of every eight columns of keys a piece.
typedef float State[KEY / 8][4];

// An operand A of a matrix as the tensor cores left it: columns 16 at and on.
template <int TILES>
__device__ __forceinline__ void operand(u32 to[4], const float (&from)[TILES][4], int at) {
    to[0] = pack(from[2 * at][0], from[2 * at][1]);
    to[1] = pack(from[2 * at][2], from[2 * at][3]);
    to[2] = pack(from[2 * at + 1][0], from[2 * at + 1][1]);
    to[3] = pack(from[2 * at + 1][2], from[2 * at + 1][3]);
}

// to += S^T x^T for a tile x of tokens.
__device__ __forceinline__ void add_of_state(float (&to)[8][4], const State& s, u32 tile) {
#pragma unroll
    for (int at = 0; at < KEY / 16; at++) {
        u32 own[4];
        operand(own, s, at);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 other[4];
            ldmatrix(other, tile_along<KEY>(tile, j * 16, at * 16));
            mma(to[2 * j], own, other);
            mma(to[2 * j + 1], own, other + 2);
        }
    }
}

// s += x^T y for a tile y of tokens; x^T as operands.
__device__ __forceinline__ void add_to_state(State& s, const u32 (&x)[4][4], u32 tile) {
#pragma unroll
    for (int at = 0; at < 4; at++) {
#pragma unroll
        for (int j = 0; j < KEY / 16; j++) {
            u32 other[4];
            ldmatrix_transposed(other, tile_down<KEY>(tile, at * 16, j * 16));
            mma(s[2 * j], x[at], other);
            mma(s[2 * j + 1], x[at], other + 2);
        }
    }
}

// to += x^T m^T for a lower triangular m.
__device__ __forceinline__ void add_lower(float (&to)[8][4], const u32 (&x)[4][4], u32 m) {
#pragma unroll
    for (int at = 0; at < 4; at++) {
#pragma unroll
        for (int j = at; j < 4; j++) {
            u32 other[4];
            ldmatrix(other, tile_along<CHUNK>(m, j * 16, at * 16));
            mma(to[2 * j], x[at], other);
            mma(to[2 * j + 1], x[at], other + 2);
        }
    }
}

// to += x^T m for a lower triangular m.
__device__ __forceinline__ void add_upper(float (&to)[8][4], const u32 (&x)[4][4], u32 m) {
#pragma unroll
    for (int at = 0; at < 4; at++) {
#pragma unroll
        for (int j = 0; j <= at; j++) {
            u32 other[4];
            ldmatrix_transposed(other, tile_down<CHUNK>(m, at * 16, j * 16));
            mma(to[2 * j], x[at], other);
            mma(to[2 * j + 1], x[at], other + 2);
        }
    }
}

// Multiplies tokens with their factors.
__device__ __forceinline__ void scale_tokens(float (&x)[8][4], const float* by) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int tile = 0; tile < 8; tile++) {
        float2 f = *(const float2*)&by[tile * 8 + lane % 4 * 2];
        x[tile][0] *= f.x;
        x[tile][1] *= f.y;
        x[tile][2] *= f.x;
        x[tile][3] *= f.y;
    }
}

// Operands of what lies as bf16, and of the same with factors.
__device__ __forceinline__ void scaled(u32 (&to)[4][4], const u32 (&from)[4][4], const float* by) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int at = 0; at < 4; at++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float2 f = *(const float2*)&by[at * 16 + half * 8 + lane % 4 * 2];
            for (int e = 2 * half; e < 2 * half + 2; e++) to[at][e] = pack(low(from[at][e]) * f.x, high(from[at][e]) * f.y);
        }
    }
}

__device__ __forceinline__ void operands(u32 (&to)[4][4], const float (&from)[8][4]) {
#pragma unroll
    for (int at = 0; at < 4; at++) operand(to[at], from, at);
}

// What operands are of.
__device__ __forceinline__ void values(float (&to)[8][4], const u32 (&from)[4][4]) {
#pragma unroll
    for (int at = 0; at < 4; at++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            to[2 * at + e / 2][e % 2 * 2] = low(from[at][e]);
            to[2 * at + e / 2][e % 2 * 2 + 1] = high(from[at][e]);
        }
    }
}

// Writes what a warp has of its columns for every token.
__device__ __forceinline__ void write_tokens(const View& to, const Chunk& c, int column, const u32 (&x)[4][4]) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int at = 0; at < 4; at++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            u32 word = transposed(x[at][e]);
            int t = at * 16 + e / 2 * 8 + lane / 4;
            if (t < c.rows) *(u32*)(row(to, c.row + t) + column + e % 2 * 8 + lane % 4 * 2) = word;
        }
    }
}

// Writes a state to its slot, [VALUE, KEY] a head.
__device__ __forceinline__ void write_state(bf16* states, long long slot, int column, const State& s) {
    int lane = threadIdx.x & 31;
    bf16* to = states + slot * (VALUE * KEY) + (column + lane / 4) * KEY + lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < KEY / 8; tile++) {
        *(u32*)(to + tile * 8) = pack(s[tile][0], s[tile][1]);
        *(u32*)(to + 8 * KEY + tile * 8) = pack(s[tile][2], s[tile][3]);
    }
}

// Walks along an example: the output, or with STATES what the backward pass reads, v' and the states between chunks. Where a text is
// continued, it begins with the states that lie there and leaves those behind it.
template <bool STATES>
__device__ __forceinline__ void walk(const Chunk* chunks, const Walk* walks, const Reads& from, View to, bf16* states, float* text, const Rule& d) {
    __shared__ Factors f;
    Walk own = walks[blockIdx.y];
    constexpr int PARTS = VALUE / COLUMNS;
    int head = blockIdx.x / PARTS, column = blockIdx.x % PARTS * COLUMNS, warp = threadIdx.x / 32;
    u32 memory = shared_address(shared);
    // Of a text's states, [VALUE, KEY] a head, the first that a lane has.
    int of_text = (head * VALUE + column + warp * 16 + threadIdx.x % 32 / 4) * KEY + threadIdx.x % 4 * 2;
    State s, fork;
    Chunk next = chunks[own.first], after = chunks[own.first + min(1, own.count - 1)];
    Numbers ahead = numbers(next, from, d, head);
    fetch<!STATES>(stage(memory, 0), next, from, d, head, column);
    commit_copies();
    for (int at = 0; at < own.count; at++) {
        Chunk c = next;
        Stage tiles = stage(memory, STAGES > 1 ? at % 2 : 0);
        factors(ahead, f);
        if (at + 1 < own.count) {
            next = after;
            after = chunks[own.first + min(at + 2, own.count - 1)];
            ahead = numbers(next, from, d, head);
        }
        if (STAGES > 1 && at + 1 < own.count) fetch<!STATES>(stage(memory, (at + 1) % 2), next, from, d, head, column);
        commit_copies();
        copies_done<STAGES - 1>();
        __syncthreads();
        if (c.from != FROM_BEFORE) {
#pragma unroll
            for (int tile = 0; tile < KEY / 8; tile++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[tile][e] = c.from == FROM_ZERO ? 0.f : fork[tile][e];
            if (!STATES && c.from == FROM_TEXT) {
#pragma unroll
                for (int tile = 0; tile < KEY / 8; tile++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[tile][e] = text[of_text + (tile * 8 + e % 2) + e / 2 * 8 * KEY];
            }
        }
        float x[8][4] = {}, y[8][4] = {};
        u32 written[4][4];
#pragma unroll
        for (int t = 0; t < 4; t++) ldmatrix_transposed(written[t], tile_along<COLUMNS>(tiles.values, t * 16, warp * 16));
        if (!STATES) {
            add_of_state(y, s, tiles.q);
            scale_tokens(y, f.of_q);
        }
        if (SOLVES) {
            // v - e^G S^T k, then v'.
            add_of_state(x, s, tiles.k);
            scale_tokens(x, f.of_k);
#pragma unroll
            for (int t = 0; t < 4; t++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float* p = &x[2 * t + e / 2][e % 2 * 2];
                    written[t][e] = pack(low(written[t][e]) - p[0], high(written[t][e]) - p[1]);
                }
            }
#pragma unroll
            for (int tile = 0; tile < 8; tile++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[tile][e] = 0.f;
            add_lower(x, written, tiles.solve);
            operands(written, x);
        } else {
            values(x, written);
            float skip = d.skip[head];
#pragma unroll
            for (int tile = 0; tile < 8; tile++)
#pragma unroll
                for (int e = 0; e < 4; e++) y[tile][e] += skip * x[tile][e];
        }
        if (STATES) {
            if (SOLVES) write_tokens(to, c, head * VALUE + column + warp * 16, written);
        } else {
            add_lower(y, written, tiles.scores);
            u32 out[4][4];
            operands(out, y);
            write_tokens(to, c, head * VALUE + column + warp * 16, out);
        }
        scale_tokens(x, f.of_update);
        operands(written, x);
#pragma unroll
        for (int tile = 0; tile < KEY / 8; tile++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[tile][e] *= f.end;
        add_to_state(s, written, tiles.k);
        if (c.first + c.rows == c.prompt) {
#pragma unroll
            for (int tile = 0; tile < KEY / 8; tile++)
#pragma unroll
                for (int e = 0; e < 4; e++) fork[tile][e] = s[tile][e];
        }
        if (STATES && c.leave >= 0) write_state(states, (long long)c.leave * d.heads + head, column + warp * 16, s);
        __syncthreads();
        if (STAGES == 1 && at + 1 < own.count) fetch<!STATES>(tiles, next, from, d, head, column);
        if (STAGES == 1) commit_copies();
    }
    if (!STATES && text) {
#pragma unroll
        for (int tile = 0; tile < KEY / 8; tile++)
#pragma unroll
            for (int e = 0; e < 4; e++) text[of_text + (tile * 8 + e % 2) + e / 2 * 8 * KEY] = s[tile][e];
    }
}

extern "C" __global__ void __launch_bounds__(COLUMNS * 2) recurrence_forward(const Chunk* chunks, const Walk* walks, Reads from, View to, float* text, Rule d) {
    walk<false>(chunks, walks, from, to, nullptr, text, d);
}

extern "C" __global__ void __launch_bounds__(COLUMNS * 2) recurrence_states(const Chunk* chunks, const Walk* walks, Reads from, View to, bf16* states, Rule d) {
    walk<true>(chunks, walks, from, to, states, nullptr, d);
}

// Walks back along an example: the gradient by v, and those by the states that chunks leave. `from.v` is that of the output. What
// answers give to the prompt's last state is summed from the last one to the first.
extern "C" __global__ void __launch_bounds__(COLUMNS * 2) recurrence_backward(const Chunk* chunks, const Walk* walks, Reads from, View dv, bf16* dstates, Rule d) {
    __shared__ Factors f;
    Walk own = walks[blockIdx.y];
    constexpr int PARTS = VALUE / COLUMNS;
    int head = blockIdx.x / PARTS, column = blockIdx.x % PARTS * COLUMNS, warp = threadIdx.x / 32;
    u32 memory = shared_address(shared);
    State s = {}, fork = {};
    Chunk next = chunks[own.first + own.count - 1], after = chunks[own.first + max(own.count - 2, 0)];
    Numbers ahead = numbers(next, from, d, head);
    fetch<true>(stage(memory, 0), next, from, d, head, column);
    commit_copies();
    for (int at = 0; at < own.count; at++) {
        Chunk c = next;
        Stage tiles = stage(memory, STAGES > 1 ? at % 2 : 0);
        factors(ahead, f);
        if (at + 1 < own.count) {
            next = after;
            after = chunks[own.first + max(own.count - 3 - at, 0)];
            ahead = numbers(next, from, d, head);
        }
        if (STAGES > 1 && at + 1 < own.count) fetch<true>(stage(memory, (at + 1) % 2), next, from, d, head, column);
        commit_copies();
        copies_done<STAGES - 1>();
        __syncthreads();
        if (c.first + c.rows == c.prompt) {
#pragma unroll
            for (int tile = 0; tile < KEY / 8; tile++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[tile][e] = fork[tile][e];
        }
        if (c.leave >= 0) write_state(dstates, (long long)c.leave * d.heads + head, column + warp * 16, s);
        // By v' first: of the state and of the scores; then by v.
        float x[8][4] = {};
        u32 dout[4][4], dx[4][4];
#pragma unroll
        for (int t = 0; t < 4; t++) ldmatrix_transposed(dout[t], tile_along<COLUMNS>(tiles.values, t * 16, warp * 16));
        add_of_state(x, s, tiles.k);
        scale_tokens(x, f.of_update);
        add_upper(x, dout, tiles.scores);
        if (SOLVES) {
            operands(dx, x);
#pragma unroll
            for (int tile = 0; tile < 8; tile++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[tile][e] = 0.f;
            add_upper(x, dx, tiles.solve);
        } else {
            float own[8][4], skip = d.skip[head];
            values(own, dout);
#pragma unroll
            for (int tile = 0; tile < 8; tile++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[tile][e] += skip * own[tile][e];
        }
        operands(dx, x);
        write_tokens(dv, c, head * VALUE + column + warp * 16, dx);
#pragma unroll
        for (int tile = 0; tile < KEY / 8; tile++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[tile][e] *= f.end;
        scaled(dout, dout, f.of_q);
        add_to_state(s, dout, tiles.q);
        if (SOLVES) {
#pragma unroll
            for (int tile = 0; tile < 8; tile++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[tile][e] = -x[tile][e];
            scale_tokens(x, f.of_k);
            operands(dx, x);
            add_to_state(s, dx, tiles.k);
        }
        if (c.from == FROM_PROMPT) {
#pragma unroll
            for (int tile = 0; tile < KEY / 8; tile++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    fork[tile][e] += s[tile][e];
                    s[tile][e] = 0.f;
                }
        }
        __syncthreads();
        if (STAGES == 1 && at + 1 < own.count) fetch<true>(tiles, next, from, d, head, column);
        if (STAGES == 1) commit_copies();
    }
}
