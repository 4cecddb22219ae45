// The gradients by q, k, a and b, chunk by chunk, all at once: of what `recurrence_states` and `recurrence_backward` left, v', its gradient
// through the solved system, which is the one by v, and states with theirs. A block has a chunk of a key head, and its value heads one after
// the other. Of one of those, with D_ij = e^(G_i - G_j); H is of the delta rule alone:
//
//   N_ij = D_ij (do_i v'_j), j <= i            H_ij = -D_ij (dv_i v'_j), j < i
//   dq_i = e^G_i S do_i + sum_j N_ij k_j
//   dk_i = e^(G_end - G_i) dS' v'_i - e^G_i S dv_i + sum_j (N_ji q_j + H_ij k_j + H_ji k_j)
//   dG_i = q_i dq_i + k_i (what dk_i has of row i of H and of S) - k_i (the rest of dk_i)
//   dG_end = sum_i k_i (e^(G_end - G_i) dS' v'_i) + e^G_end <S, dS'>
//   dbeta_i = (dv_i v'_i) / beta_i^2
//
// What q and k are multiplied with is a factor of N and H, so that their rows lie as they came. Gradients pass through the norms in the end;
// that by a time step is k_i dk_i over the step.

#define SLAB COLUMNS
#define SLABS (VALUE / SLAB)
#define VJP_STAGE (3 * tile_bytes<SLAB>(CHUNK) + 2 * tile_bytes<KEY>(SLAB))
// Warps that share sixteen tokens; tiles of eight keys that each of them has.
#define PARTS 4
#define TILES (KEY / 8 / PARTS)

struct Gradients {
    View dout, dv, written, da, db, dq, dk;
    const bf16 *states, *dstates;
};

typedef float Part[TILES][4];

// x += y z: of a y as an operand, and rows of KEY columns.
__device__ __forceinline__ void add_rows(Part& x, const u32 y[4], u32 tile, int row, int column) {
#pragma unroll
    for (int j = 0; j < TILES; j += 2) {
        u32 other[4];
        ldmatrix_transposed(other, tile_down<KEY>(tile, row, column + j * 8));
        mma(x[j], y, other);
        if (j + 1 < TILES) mma(x[j + 1], y, other + 2);
    }
}

// Adds products of a thread's part of rows with a tile's to two sums, of row lane / 4 and of the one eight below.
__device__ __forceinline__ void add_dots(float to[2], const Part& x, u32 tile, int row, int column) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 w;
            u32 at = tile_at<KEY>(tile, row + half * 8 + lane / 4, column + j * 8) + lane % 4 * 4;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w) : "r"(at));
            to[half] += x[j][2 * half] * low(w) + x[j][2 * half + 1] * high(w);
        }
    }
}

// Sums of four lanes each, into a row of shared memory that each part of the keys has.
__device__ __forceinline__ void put_dots(float (&to)[PARTS][CHUNK], int part, int row, float of[2]) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        of[half] += __shfl_xor_sync(0xffffffffu, of[half], 1);
        of[half] += __shfl_xor_sync(0xffffffffu, of[half], 2);
        if (lane % 4 == 0) to[part][row + half * 8 + lane / 4] = of[half];
    }
}

__device__ __forceinline__ float all_parts(const float (&of)[PARTS][CHUNK], int t) {
    float sum = 0.f;
    for (int part = 0; part < PARTS; part++) sum += of[part][t];
    return sum;
}

__device__ __forceinline__ void fetch_slab(u32 to, const Chunk& c, const Gradients& g, const Rule& d, int head, int slab) {
    int column = head * VALUE + slab * SLAB;
    constexpr int TOKENS = tile_bytes<SLAB>(CHUNK);
    copy_tile<SLAB, CHUNK>(to, row(g.dout, c.row) + column, g.dout.ld, c.rows);
    if (SOLVES) copy_tile<SLAB, CHUNK>(to + TOKENS, row(g.dv, c.row) + column, g.dv.ld, c.rows);
    copy_tile<SLAB, CHUNK>(to + 2 * TOKENS, row(g.written, c.row) + column, g.written.ld, c.rows);
    long long within = (long long)head * VALUE * KEY + slab * SLAB * KEY, all = (long long)d.heads * VALUE * KEY;
    if (c.enter >= 0) copy_tile<KEY, SLAB>(to + 3 * TOKENS, g.states + c.enter * all + within, KEY, SLAB);
    if (c.leave >= 0) copy_tile<KEY, SLAB>(to + 3 * TOKENS + tile_bytes<KEY>(SLAB), g.dstates + c.leave * all + within, KEY, SLAB);
}

// Writes a thread's part of rows, less what the norm of a row takes away: x - y (y x) / |y|^2.
__device__ __forceinline__ void write_rows(const View& to, const Chunk& c, const Part& x, u32 tile, int r, int column, int first, const float by[2]) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int t = r + half * 8 + lane / 4;
        if (t >= c.rows) continue;
        bf16* out = row(to, c.row + t) + first + column + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            u32 w;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w) : "r"(tile_at<KEY>(tile, t, column + j * 8) + lane % 4 * 4));
            *(u32*)(out + j * 8) = pack(x[j][2 * half] - by[half] * low(w), x[j][2 * half + 1] - by[half] * high(w));
        }
    }
}

extern "C" __global__ void __launch_bounds__(128 * PARTS) recurrence_gradients(const Chunk* chunks, const u32* begins, Reads from, View a, View b, Gradients g, Rule d) {
    __shared__ Factors f;
    __shared__ float sums[CHUNK], betas[CHUNK], q_norms[CHUNK], k_norms[CHUNK], slopes[CHUNK];
    __shared__ float dots[2][PARTS][CHUNK], products[4 * PARTS];
    __shared__ int first_seen[CHUNK];
    Chunk c = chunks[blockIdx.y];
    int of_key = blockIdx.x, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    // A warp has 16 tokens, and a part of the keys' columns; of scores, a part of the tokens that are seen.
    int mine = warp % 4 * 16, part = warp / 4, column = part * (KEY / PARTS);
    u32 q_tile = shared_address(shared), k_tile = q_tile + KEYS, slabs = k_tile + KEYS;
    constexpr int TOKENS = tile_bytes<SLAB>(CHUNK);
    copy_tile<KEY, CHUNK>(q_tile, row(from.q, c.row) + of_key * KEY, from.q.ld, c.rows);
    copy_tile<KEY, CHUNK>(k_tile, row(from.k, c.row) + of_key * KEY, from.k.ld, c.rows);
    commit_copies();
    if (thread < CHUNK) first_seen[thread] = thread < c.rows ? begins[c.row + thread] : 0;
    // Slabs of values, of one head after the other.
    int slabs_of_all = d.share * SLABS;
    fetch_slab(slabs, c, g, d, of_key * d.share, 0);
    commit_copies();
    Part all_q = {}, all_k = {};
    for (int own = 0; own < d.share; own++) {
        int head = of_key * d.share + own;
        Numbers n = numbers(c, from, d, head);
        factors(n, f);
        if (thread < CHUNK) {
            sums[thread] = n.decay;
            q_norms[thread] = n.q_norm;
            k_norms[thread] = n.k_norm;
            if (SOLVES) betas[thread] = thread < c.rows ? sigmoid(to_float(row(b, c.row + thread)[head])) : 0.f;
        }
        Part by_q = {}, by_row = {}, by_column = {};
        float of_scores[2][4] = {}, of_system[2][4] = {}, product = 0.f;
#pragma unroll 1
        for (int slab = 0; slab < SLABS; slab++) {
            int at_hand = own * SLABS + slab, next = at_hand + 1;
            u32 tiles = slabs + (STAGES > 1 ? at_hand % 2 * VJP_STAGE : 0);
            if (STAGES > 1 && next < slabs_of_all)
                fetch_slab(slabs + next % 2 * VJP_STAGE, c, g, d, of_key * d.share + next / SLABS, next % SLABS);
            commit_copies();
            copies_done<STAGES - 1>();
            __syncthreads();
            u32 dout = tiles, dv = tiles + TOKENS, written = tiles + 2 * TOKENS;
            u32 state = tiles + 3 * TOKENS, dstate = state + tile_bytes<KEY>(SLAB);
#pragma unroll 1
            for (int at = 0; at < SLAB; at += 16) {
                u32 own_dout[4], own_dv[4], own_written[4];
                ldmatrix(own_dout, tile_down<SLAB>(dout, mine, at));
                if (SOLVES) ldmatrix(own_dv, tile_down<SLAB>(dv, mine, at));
                ldmatrix(own_written, tile_down<SLAB>(written, mine, at));
                if (c.enter >= 0) {
                    add_rows(by_q, own_dout, state, at, column);
                    if (SOLVES) add_rows(by_row, own_dv, state, at, column);
                }
                if (c.leave >= 0) add_rows(by_column, own_written, dstate, at, column);
                u32 other[4];
                ldmatrix(other, tile_along<SLAB>(written, part * 16, at));
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    mma(of_scores[half], own_dout, other + 2 * half);
                    if (SOLVES) mma(of_system[half], own_dv, other + 2 * half);
                }
            }
            if (c.enter >= 0 && c.leave >= 0) {
                for (int i = thread; i < SLAB * KEY / 8; i += 128 * PARTS) {
                    u32 x[4], y[4], at = tile_at<KEY>(0, i / (KEY / 8), i % (KEY / 8) * 8);
                    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(state + at));
                    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3]) : "r"(dstate + at));
#pragma unroll
                    for (int e = 0; e < 4; e++) product += low(x[e]) * low(y[e]) + high(x[e]) * high(y[e]);
                }
            }
            __syncthreads();
            if (STAGES == 1 && slab + 1 < SLABS) fetch_slab(slabs, c, g, d, head, slab + 1);
            if (STAGES == 1) commit_copies();
        }
        float of_end[2] = {};
#pragma unroll
        for (int j = 0; j < TILES; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int t = mine + lane / 4 + e / 2 * 8;
                by_q[j][e] *= f.of_q[t];
                by_row[j][e] *= -f.of_k[t];
                by_column[j][e] *= f.of_update[t];
            }
        }
        add_dots(of_end, by_column, k_tile, mine, column);
        product = warp_sum(f.end * product + of_end[0] + of_end[1]);
        if (lane == 0) products[warp] = product;
        // N and H lie behind the slabs, or take the place of the only one.
        u32 scores = slabs + (STAGES > 1 ? 2 * VJP_STAGE : 0), system = scores + SQUARE;
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int i = mine + lane / 4 + half * 8, j = part * 16 + tile * 8 + lane % 4 * 2;
                float n[2], h[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    bool seen = (i < c.rows) & sees(c, first_seen[i], i, j + e);
                    float decay = __expf(seen ? sums[i] - sums[j + e] : HIDDEN) * k_norms[j + e];
                    n[e] = decay * q_norms[i] * of_scores[tile][2 * half + e];
                    h[e] = i == j + e ? 0.f : -decay * k_norms[i] * of_system[tile][2 * half + e];
                    if (SOLVES && i == j + e) slopes[i] = of_system[tile][2 * half + e];
                }
                u32 at = tile_at<CHUNK>(0, i, j & ~7) + (j & 7) * 2;
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(scores + at), "r"(pack(n[0], n[1])) : "memory");
                if (SOLVES) asm volatile("st.shared.u32 [%0], %1;" ::"r"(system + at), "r"(pack(h[0], h[1])) : "memory");
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int at = 0; at < CHUNK; at += 16) {
            u32 n[4], h[4];
            if (at <= mine) {
                ldmatrix(n, tile_down<CHUNK>(scores, mine, at));
                add_rows(by_q, n, k_tile, at, column);
                if (SOLVES) {
                    ldmatrix(h, tile_down<CHUNK>(system, mine, at));
                    add_rows(by_row, h, k_tile, at, column);
                }
            }
            if (at >= mine) {
                ldmatrix_transposed(n, tile_along<CHUNK>(scores, at, mine));
                add_rows(by_column, n, q_tile, at, column);
                if (SOLVES) {
                    ldmatrix_transposed(h, tile_along<CHUNK>(system, at, mine));
                    add_rows(by_column, h, k_tile, at, column);
                }
            }
        }
        float pulls[2][2] = {}, of_column[2] = {};
        add_dots(pulls[0], by_q, q_tile, mine, column);
        if (SOLVES) add_dots(pulls[0], by_row, k_tile, mine, column);
        add_dots(of_column, by_column, k_tile, mine, column);
        for (int half = 0; half < 2; half++) {
            pulls[0][half] -= of_column[half];
            pulls[1][half] = of_column[half];
        }
        put_dots(dots[0], part, mine, pulls[0]);
        if (!SOLVES) put_dots(dots[1], part, mine, pulls[1]);
#pragma unroll
        for (int j = 0; j < TILES; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                all_q[j][e] += by_q[j][e];
                all_k[j][e] += by_row[j][e] + by_column[j][e];
            }
        }
        __syncthreads();
        if (warp == 0) {
            // Of every log decay, what the sums behind it give; lane l has tokens 2l and 2l + 1.
            float of[2], end = 0.f;
            for (int i = 0; i < 2; i++) {
                int t = 2 * lane + i;
                of[i] = all_parts(dots[0], t);
            }
            for (int i = 0; i < 4 * PARTS; i++) end += products[i];
            for (int i = 0; i < 2; i++) {
                if (2 * lane + i >= c.rows) of[i] = 0.f;
                if (2 * lane + i == c.rows - 1) of[i] += end;
            }
            float pair = of[0] + of[1], from_here = pair;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                float other = __shfl_down_sync(0xffffffffu, from_here, step);
                if (lane + step < 32) from_here += other;
            }
            sums[2 * lane] = from_here;
            sums[2 * lane + 1] = from_here - of[0];
            __syncwarp();
            for (int i = 0; i < 2; i++) {
                int t = 2 * lane + i, end_of = t + 1;
                if (t >= c.rows) continue;
                // An answer's tokens do not decay what other answers read.
                bool parted = c.first < c.prompt && c.first + t >= c.prompt;
                while (parted && end_of < c.rows && first_seen[end_of] == first_seen[t]) end_of++;
                float own = sums[t] - (parted && end_of < c.rows ? sums[end_of] : 0.f);
                float x = to_float(row(a, c.row + t)[head]) + d.dt_bias[head];
                float by_step = -own * expf(d.a_log[head]);
                if (SOLVES) {
                    float beta = betas[t];
                    row(g.db, c.row + t)[head] = to_bf16(beta > 0.f ? slopes[t] * (1.f - beta) / beta : 0.f);
                } else {
                    // A step that is clamped has no gradient.
                    float step = softplus(x);
                    by_step = step > 0.f && step >= d.least && step <= d.most ? by_step + all_parts(dots[1], t) / step : 0.f;
                }
                row(g.da, c.row + t)[head] = to_bf16(by_step * sigmoid(x));
            }
        }
        __syncthreads();
        if (STAGES == 1 && own + 1 < d.share) {
            fetch_slab(slabs, c, g, d, head + 1, 0);
            commit_copies();
        }
    }
    float by[2][2] = {};
    if (SOLVES) {
        float pulls[2][2] = {};
        add_dots(pulls[0], all_q, q_tile, mine, column);
        add_dots(pulls[1], all_k, k_tile, mine, column);
        for (int i = 0; i < 2; i++) put_dots(dots[i], part, mine, pulls[i]);
        __syncthreads();
        for (int half = 0; half < 2; half++) {
            int t = mine + half * 8 + lane / 4;
            by[0][half] = all_parts(dots[0], t) * q_norms[t] * q_norms[t] * KEY;
            by[1][half] = all_parts(dots[1], t) * k_norms[t] * k_norms[t];
        }
    }
    write_rows(g.dq, c, all_q, q_tile, mine, column, of_key * KEY, by[0]);
    write_rows(g.dk, c, all_k, k_tile, mine, column, of_key * KEY, by[1]);
}
