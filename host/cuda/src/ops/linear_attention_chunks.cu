// What a chunk needs of its own tokens, for all chunks at once: `recurrence_chunks`, whose results `linear_attention.cu` names.

// Sums of squares of a tile's rows to `to`, as 1 / sqrt(sum + eps); 256 / CHUNK lanes have a row, or 128 / CHUNK.
__device__ __forceinline__ void inverse_norms(u32 tile, float eps, float* to) {
    int lanes = blockDim.x / CHUNK, r = threadIdx.x / lanes;
    float sum = 0.f;
    for (int column = threadIdx.x % lanes * 8; column < KEY; column += lanes * 8) {
        u32 w[4];
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(tile_at<KEY>(tile, r, column)));
#pragma unroll
        for (int i = 0; i < 4; i++) sum += low(w[i]) * low(w[i]) + high(w[i]) * high(w[i]);
    }
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % lanes == 0) to[r] = rsqrtf(sum + eps);
}

// The sums of log decays along a chunk, of a warp: lane l has tokens 2l and 2l + 1. `own` is a log decay, `begin` where the token's answer
// begins. Where a chunk has several answers, each goes on from the prompt's end.
__device__ __forceinline__ void sum_decays(const Chunk& c, const float own[2], const int begin[2], float* sums) {
    int lane = threadIdx.x & 31;
    float pair = own[0] + own[1], upto = pair;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        float other = __shfl_up_sync(0xffffffffu, upto, step);
        if (lane >= step) upto += other;
    }
    sums[2 * lane] = upto - own[1];
    sums[2 * lane + 1] = upto;
    __syncwarp();
    float skipped[2];
    for (int i = 0; i < 2; i++) {
        int first = begin[i] - c.first, prompt = c.prompt - c.first;
        bool jumps = 2 * lane + i < c.rows && prompt > 0 && 2 * lane + i >= first;
        skipped[i] = jumps ? sums[first - 1] - sums[prompt - 1] : 0.f;
    }
    __syncwarp();
    for (int i = 0; i < 2; i++) sums[2 * lane + i] -= skipped[i];
}

// The inverse of 1 + `system`, which is below the diagonal and lies column by column, by forward substitution; times betas, in rows: P. Eight
// lanes have four columns, in turns of four rows.
__device__ __forceinline__ void substitute(const float* system, const float* betas, bf16* rows) {
    int thread = threadIdx.x, lane = thread % 32;
    int columns = thread / 8 * 4, turn = thread % 8;
    float x[2][4][4];
#pragma unroll
    for (int g = 0; g < 2; g++)
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
            for (int j = 0; j < 4; j++) x[g][e][j] = columns + j == 32 * g + 4 * turn + e ? 1.f : 0.f;
    // Of four rows in turn, which eight lanes have: half of them in the second half of the system. Loops are loops, since code that is run
    // once has to be fetched.
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll 1
        for (int owner = 0; owner < 8; owner++) {
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const float* entries = system + (32 * half + 4 * owner + m) * CHUNK + 4 * turn;
                float own[4];
#pragma unroll
                for (int j = 0; j < 4; j++) own[j] = __shfl_sync(0xffffffffu, x[half][m][j], (lane & ~7) + owner);
#pragma unroll
                for (int g = half; g < 2; g++) {
                    float4 l = *(const float4*)&entries[32 * g];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        x[g][0][j] -= l.x * own[j];
                        x[g][1][j] -= l.y * own[j];
                        x[g][2][j] -= l.z * own[j];
                        x[g][3][j] -= l.w * own[j];
                    }
                }
            }
        }
    }
#pragma unroll
    for (int g = 0; g < 2; g++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float* out = x[g][e];
            for (int j = 0; j < 4; j++) out[j] *= betas[columns + j];
            *(uint2*)&rows[(32 * g + 4 * turn + e) * CHUNK + columns] = make_uint2(pack(out[0], out[1]), pack(out[2], out[3]));
        }
    }
}

// Of every chunk and value head: P and the scores of q with k, both [CHUNK] a token, the sums of log decays, and what q and k are multiplied
// with.
extern "C" __global__ void __launch_bounds__(128) recurrence_chunks(const Chunk* chunks, const u32* begins, View q, View k, View a, View b,
                                                               View solve, View scores, float* decays, float* q_norms, float* k_norms, Rule d) {
    __shared__ float sums[CHUNK], betas[CHUNK], norms[2][CHUNK];
    __shared__ int first_seen[CHUNK];
    Chunk c = chunks[blockIdx.y];
    int head = blockIdx.x, of_key = head / d.share, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    u32 q_tile = shared_address(shared), k_tile = q_tile + tile_bytes<KEY>(CHUNK);
    float* system = (float*)(shared + 2 * tile_bytes<KEY>(CHUNK));
    copy_tile<KEY, CHUNK>(q_tile, row(q, c.row) + of_key * KEY, q.ld, c.rows);
    copy_tile<KEY, CHUNK>(k_tile, row(k, c.row) + of_key * KEY, k.ld, c.rows);
    commit_copies();
    if (warp == 0) {
        float own[2];
        int begin[2];
        for (int i = 0; i < 2; i++) {
            int t = 2 * lane + i;
            bool inside = t < c.rows;
            begin[i] = inside ? begins[c.row + t] : 0;
            float step = inside ? softplus(to_float(row(a, c.row + t)[head]) + d.dt_bias[head]) : 0.f;
            if (!SOLVES && inside) step = fminf(fmaxf(step, d.least), d.most);
            own[i] = -expf(d.a_log[head]) * step;
            betas[t] = SOLVES && inside ? sigmoid(to_float(row(b, c.row + t)[head])) : 0.f;
            if (!SOLVES) {
                norms[0][t] = 1.f;
                norms[1][t] = step;
            }
            first_seen[t] = begin[i];
        }
        sum_decays(c, own, begin, sums);
        for (int i = 0; i < 2; i++) {
            int t = 2 * lane + i;
            if (t < c.rows) decays[(long long)head * d.tokens + c.row + t] = sums[t];
        }
    }
    copies_done<0>();
    __syncthreads();
    if (SOLVES) {
        inverse_norms(q_tile, d.eps, norms[0]);
        inverse_norms(k_tile, d.eps, norms[1]);
    }
    float qk[8][4] = {}, kk[8][4] = {};
#pragma unroll
    for (int at = 0; at < KEY; at += 16) {
        u32 own[2][4];
        ldmatrix(own[0], tile_down<KEY>(q_tile, warp * 16, at));
        ldmatrix(own[1], tile_down<KEY>(k_tile, warp * 16, at));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j > warp) continue;
            u32 other[4];
            ldmatrix(other, tile_along<KEY>(k_tile, j * 16, at));
#pragma unroll
            for (int half = 0; half < 2; half++) {
                mma(qk[2 * j + half], own[0], other + 2 * half);
                if (SOLVES) mma(kk[2 * j + half], own[1], other + 2 * half);
            }
        }
    }
    __syncthreads();
    // The scores take q's place on their way out, P that of k.
    bf16* score_rows = (bf16*)shared;
    bf16* solve_rows = (bf16*)(shared + CHUNK * CHUNK * 2);
    float scale = SOLVES ? rsqrtf((float)KEY) : 1.f;
#pragma unroll
    for (int tile = 0; tile < 8; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = warp * 16 + lane / 4 + half * 8, j = tile * 8 + lane % 4 * 2;
            float score[2] = {}, entry[2] = {};
            // Tiles beyond the diagonal are zero.
            if (tile <= 2 * warp + 1) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    bool seen = (i < c.rows) & sees(c, first_seen[i], i, j + e);
                    float decay = __expf(seen ? sums[i] - sums[j + e] : HIDDEN) * norms[1][j + e];
                    score[e] = decay * norms[0][i] * scale * qk[tile][2 * half + e];
                    entry[e] = i == j + e ? 0.f : decay * betas[i] * norms[1][i] * kk[tile][2 * half + e];
                }
            }
            *(u32*)&score_rows[i * CHUNK + j] = pack(score[0], score[1]);
            if (SOLVES) {
                system[j * CHUNK + i] = entry[0];
                system[(j + 1) * CHUNK + i] = entry[1];
            }
        }
    }
    __syncthreads();
    if (SOLVES) substitute(system, betas, solve_rows);
    __syncthreads();
    for (int i = thread; i < c.rows * (CHUNK / 8); i += 128) {
        int t = i / (CHUNK / 8), piece = i % (CHUNK / 8) * 8;
        if (SOLVES) *(uint4*)(row(solve, c.row + t) + head * CHUNK + piece) = *(uint4*)&solve_rows[t * CHUNK + piece];
        *(uint4*)(row(scores, c.row + t) + head * CHUNK + piece) = *(uint4*)&score_rows[t * CHUNK + piece];
    }
    if (thread < c.rows) {
        q_norms[(long long)head * d.tokens + c.row + thread] = norms[0][thread] * scale;
        k_norms[(long long)head * d.tokens + c.row + thread] = norms[1][thread];
    }
}
