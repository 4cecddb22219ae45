// The rows of routed experts: a token has one for each of its experts, sorted by expert and then by token. Their products are those of
// `gemm_hopper.cu` and `gemm_ampere.cu`, which read where every expert's rows begin.

#define TOKENS_AT_ONCE 64  // of a block that counts
#define MOST_EXPERTS 512

// What is known of the rows of some tokens, in memory that begins with `tokens`: of every row its token and its expert, of every token its
// rows, experts in their order, -1 behind the last.
struct Plan {
    int *token_of, *expert_of, *rows_of;
    int* counts;   // [blocks of tokens, experts], then what lies before
    int* offsets;  // [experts + 1]
};

__device__ __forceinline__ Plan plan_at(bf16* at, int tokens, int top_k, int experts) {
    int rows = (tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE * TOKENS_AT_ONCE;
    int *token_of = (int*)at, *expert_of = token_of + rows * top_k, *rows_of = expert_of + rows * top_k, *counts = rows_of + rows * top_k;
    return {token_of, expert_of, rows_of, counts, counts + rows / TOKENS_AT_ONCE * experts};
}

// A thread an expert counts its tokens among those of a block.
extern "C" __global__ void experts_count(View routing, bf16* at, int tokens, int top_k, int experts) {
    int first = blockIdx.x * TOKENS_AT_ONCE, e = threadIdx.x, count = 0;
    if (e >= experts) return;
#pragma unroll 8
    for (int t = 0; t < TOKENS_AT_ONCE; t++)
        if (first + t < tokens) count += (row(routing, first + t)[e] & 0x7fff) != 0;
    plan_at(at, tokens, top_k, experts).counts[blockIdx.x * experts + e] = count;
}

// One block: where every expert's rows begin, and those of every block of tokens among them.
extern "C" __global__ void __launch_bounds__(MOST_EXPERTS) experts_offsets(bf16* at, int tokens, int top_k, int experts) {
    Plan p = plan_at(at, tokens, top_k, experts);
    int blocks = (tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE, e = threadIdx.x, sum = 0, own = e < experts ? e : experts - 1;
    __shared__ int sums[MOST_EXPERTS];
    for (int b = 0; b < blocks; b += 16) {
        int counts[16];
#pragma unroll
        for (int i = 0; i < 16; i++) counts[i] = b + i < blocks ? p.counts[(b + i) * experts + own] : 0;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            if (b + i < blocks && e < experts) p.counts[(b + i) * experts + e] = sum;
            sum += counts[i];
        }
    }
    sums[e] = e < experts ? sum : 0;
    for (int step = 1; step < MOST_EXPERTS; step *= 2) {
        __syncthreads();
        int before = e >= step ? sums[e - step] : 0;
        __syncthreads();
        sums[e] += before;
    }
    __syncthreads();
    if (e < experts) p.offsets[e + 1] = sums[e];
    if (e == 0) p.offsets[0] = 0;
    // Rows behind the last one, where a weight was zero, are read and never used.
    for (int i = sums[experts - 1] + e; i < tokens * top_k; i += MOST_EXPERTS) p.token_of[i] = 0, p.expert_of[i] = 0;
}

// Gives every token its rows.
extern "C" __global__ void experts_places(View routing, bf16* at, int tokens, int top_k, int experts) {
    Plan p = plan_at(at, tokens, top_k, experts);
    __shared__ u32 masks[TOKENS_AT_ONCE][MOST_EXPERTS / 32];
    int first = blockIdx.x * TOKENS_AT_ONCE, e = threadIdx.x, warp = e / 32, lane = e % 32, warps = blockDim.x / 32;
#pragma unroll 8
    for (int t = 0; t < TOKENS_AT_ONCE; t++) {
        bool chosen = e < experts && first + t < tokens && (row(routing, first + t)[e] & 0x7fff) != 0;
        u32 mask = __ballot_sync(0xffffffffu, chosen);
        if (lane == 0) masks[t][warp] = mask;
    }
    __syncthreads();
    if (e < experts) {
        int to = p.offsets[e] + p.counts[blockIdx.x * experts + e];
        for (int t = 0; t < TOKENS_AT_ONCE; t++) {
            if (!(masks[t][warp] >> lane & 1)) continue;
            int before = __popc(masks[t][warp] & ((1u << lane) - 1));
            for (int w = 0; w < warp; w++) before += __popc(masks[t][w]);
            p.token_of[to] = first + t, p.expert_of[to] = e;
            if (before < top_k) p.rows_of[(first + t) * top_k + before] = to;
            to++;
        }
    }
    // Of tokens with fewer experts.
    for (int t = e; t < TOKENS_AT_ONCE && first + t < tokens; t += blockDim.x) {
        int count = 0;
        for (int w = 0; w < warps; w++) count += __popc(masks[t][w]);
        for (int j = count; j < top_k; j++) p.rows_of[(first + t) * top_k + j] = -1;
    }
}

// A token's values to all of its rows.
extern "C" __global__ void experts_spread(View x, bf16* at, View y, int tokens, int top_k, int experts, int width) {
    auto [token, i] = place(width);
    if (i >= width) return;
    const int* rows = plan_at(at, tokens, top_k, experts).rows_of + token * top_k;
    uint4 values = *(const uint4*)(row(x, token) + i);
#pragma unroll 8
    for (int j = 0; j < top_k; j++) {
        int to = rows[j];
        if (to >= 0) *(uint4*)(row(y, to) + i) = values;
    }
}

// A token's sum of its rows, each with its bias and times its weight where there are such.
extern "C" __global__ void experts_sum(View x, bf16* at, View routing, const bf16* bias, View y, int tokens, int top_k, int experts,
                                       int width) {
    auto [token, i] = place(width);
    if (i >= width) return;
    Plan p = plan_at(at, tokens, top_k, experts);
    Eight sum = {};
    for (int j = 0; j < top_k; j++) {
        int from = p.rows_of[token * top_k + j];
        if (from < 0) break;
        int e = p.expert_of[from];
        float weight = routing.at ? to_float(row(routing, token)[e]) : 1.f;
        Eight own = load8(row(x, from) + i), shift = {};
        if (bias) shift = load8(bias + (long long)e * width + i);
#pragma unroll
        for (int q = 0; q < 8; q++) sum.v[q] += weight * (own.v[q] + shift.v[q]);
    }
    store8(row(y, token) + i, sum);
}

// The gradient by routing of what rows give, one after the other as they lie: what is not chosen has none.
extern "C" __global__ void experts_drouting(const bf16* of_rows, bf16* at, View y, int tokens, int top_k, int experts, int width) {
    auto [token, i] = place(width);
    if (i >= width) return;
    Plan p = plan_at(at, tokens, top_k, experts);
    Eight out = {};
    for (int j = 0; j < top_k; j++) {
        int from = p.rows_of[token * top_k + j];
        if (from < 0) break;
        int e = p.expert_of[from] - i;
#pragma unroll
        for (int q = 0; q < 8; q++)
            if (q == e) out.v[q] = to_float(of_rows[from]);
    }
    store8(row(y, token) + i, out);
}

// An expert's MLP between its products.
struct Mlp {
    const bf16 *bias, *down_bias;  // of gate and up, as they lie, and of down; null where there is none
    int width, hidden;             // columns of the activation and of a token
    int kind;                      // as `activate` counts them, and SWIGLU_OAI
    int gated, interleaved;        // whether there is an up, whether gate and up come in turn
    float limit;
};

#define SWIGLU_OAI 16

// Value of a gated activation, and its derivatives by gate and by up.
struct Unit {
    float value, by_gate, by_up;
};

__device__ __forceinline__ Unit unit(const Mlp& m, float gate, float up) {
    if (m.kind == SWIGLU_OAI) {
        float g = fminf(gate, m.limit), u = fminf(fmaxf(up, -m.limit), m.limit) + 1.f, s = 1.f / (1.f + __expf(-1.702f * g));
        float slope = s * (1.f + 1.702f * g * (1.f - s));
        return {g * s * u, gate <= m.limit ? slope * u : 0.f, fabsf(up) <= m.limit ? g * s : 0.f};
    }
    Activation a = activate(gate, m.kind, 0.f);
    return {a.value * up, a.derivative * up, a.value};
}

// Eight columns of gate and of up of a row, with their biases; of an MLP without a gate, up is 1.
__device__ __forceinline__ void load_both(const Mlp& m, const bf16* x, const bf16* bias, int i, Eight& gate, Eight& up) {
    auto load = [&](int column) {
        Eight v = load8(x + column), b = {};
        if (bias) b = load8(bias + column);
#pragma unroll
        for (int q = 0; q < 8; q++) v.v[q] += b.v[q];
        return v;
    };
    if (!m.gated) {
        gate = load(i);
#pragma unroll
        for (int q = 0; q < 8; q++) up.v[q] = 1.f;
    } else if (m.interleaved) {
        Eight a = load(2 * i), b = load(2 * i + 8);
#pragma unroll
        for (int q = 0; q < 4; q++) {
            gate.v[q] = a.v[2 * q], gate.v[q + 4] = b.v[2 * q];
            up.v[q] = a.v[2 * q + 1], up.v[q + 4] = b.v[2 * q + 1];
        }
    } else {
        gate = load(i), up = load(m.width + i);
    }
}

__device__ __forceinline__ void store_both(const Mlp& m, bf16* y, int i, const Eight& gate, const Eight& up) {
    if (!m.gated) {
        store8(y + i, gate);
    } else if (m.interleaved) {
        Eight a, b;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            a.v[2 * q] = gate.v[q], b.v[2 * q] = gate.v[q + 4];
            a.v[2 * q + 1] = up.v[q], b.v[2 * q + 1] = up.v[q + 4];
        }
        store8(y + 2 * i, a), store8(y + 2 * i + 8, b);
    } else {
        store8(y + i, gate), store8(y + m.width + i, up);
    }
}

__device__ __forceinline__ const bf16* bias_of(const Mlp& m, int expert) {
    return m.bias ? m.bias + (long long)expert * m.width * (m.gated ? 2 : 1) : nullptr;
}

extern "C" __global__ void experts_activation(View x, bf16* at, View y, Mlp m, int tokens, int top_k, int experts) {
    auto [to, i] = place(m.width);
    if (i >= m.width) return;
    Eight gate, up;
    load_both(m, row(x, to), bias_of(m, plan_at(at, tokens, top_k, experts).expert_of[to]), i, gate, up);
#pragma unroll
    for (int q = 0; q < 8; q++) gate.v[q] = unit(m, gate.v[q], up.v[q]).value;
    store8(row(y, to) + i, gate);
}

// The VJP of a row, by a warp: `dh` is the product of dy and W_down, without the row's weight, whose own gradient is the product of `dh`
// and the activation. `dx` may be `x`.
extern "C" __global__ void experts_activation_vjp(View x, View dh, View dy, bf16* at, View routing, View dx, bf16* of_rows, Mlp m,
                                                  int tokens, int top_k, int experts) {
    int at_row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (at_row >= tokens * top_k) return;
    Plan p = plan_at(at, tokens, top_k, experts);
    int token = p.token_of[at_row], e = p.expert_of[at_row];
    float weight = to_float(row(routing, token)[e]), sum = 0.f;
    for (int i = lane * 8; i < m.width; i += 256) {
        Eight gate, up, d = load8(row(dh, at_row) + i);
        load_both(m, row(x, at_row), bias_of(m, e), i, gate, up);
#pragma unroll
        for (int q = 0; q < 8; q++) {
            Unit of = unit(m, gate.v[q], up.v[q]);
            sum += d.v[q] * of.value;
            gate.v[q] = weight * d.v[q] * of.by_gate, up.v[q] = weight * d.v[q] * of.by_up;
        }
        store_both(m, row(dx, at_row), i, gate, up);
    }
    if (m.down_bias) {
        for (int i = lane * 8; i < m.hidden; i += 256) {
            Eight d = load8(row(dy, at_row) + i), b = load8(m.down_bias + (long long)e * m.hidden + i);
#pragma unroll
            for (int q = 0; q < 8; q++) sum += d.v[q] * b.v[q];
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) of_rows[at_row] = to_bf16(sum);
}

// Gradients of LoRA's matrices: of every expert, to[r, column] += the sum over its rows of weight narrow[row, r] wide[row, column], where
// weight is what the row counts, or 1. For A narrow is v and wide x; for B, whose gradient lies transposed, u and dy. A block has 256
// columns of an expert and eight of the rank; its four groups of threads have rows of their own, whose sums are added in their order.
#define LORA_GROUPS 4
#define LORA_ROWS 64  // at a time, of all groups
#define LORA_AHEAD 8  // rows of a thread that are on their way

extern "C" __global__ void __launch_bounds__(128 * LORA_GROUPS) experts_lora_vjp(View narrow, View wide, bf16* at, View routing, float* to, int tokens,
                                                                                int top_k, int experts, int width, int rank) {
    Plan p = plan_at(at, tokens, top_k, experts);
    int e = blockIdx.y, r0 = blockIdx.z * 8, begin = p.offsets[e], end = p.offsets[e + 1];
    if (begin == end) return;
    int group = threadIdx.x / 128, lane = threadIdx.x % 128, column = blockIdx.x * 256 + lane * 2;
    bool inside = column < width;
    __shared__ float values[LORA_ROWS][8];
    __shared__ float2 sums[LORA_GROUPS - 1][8][128];
    auto value = [&](int from) {
        if (from >= end) return 0.f;
        float v = to_float(row(narrow, from)[r0 + threadIdx.x % 8]);
        return routing.at ? v * to_float(row(routing, p.token_of[from])[e]) : v;
    };
    float sum[8][2] = {}, next = value(begin + threadIdx.x / 8);
    for (int first = begin; first < end; first += LORA_ROWS) {
        __syncthreads();
        values[threadIdx.x / 8][threadIdx.x % 8] = next;
        __syncthreads();
        next = value(first + LORA_ROWS + threadIdx.x / 8);
        if (!inside) continue;
#pragma unroll
        for (int i = 0; i < LORA_ROWS / LORA_GROUPS; i += LORA_AHEAD) {
            int t = group * (LORA_ROWS / LORA_GROUPS) + i;
            u32 pairs[LORA_AHEAD];
#pragma unroll
            for (int j = 0; j < LORA_AHEAD; j++) pairs[j] = first + t + j < end ? *(const u32*)(row(wide, first + t + j) + column) : 0;
#pragma unroll
            for (int j = 0; j < LORA_AHEAD; j++) {
                float low = __uint_as_float(pairs[j] << 16), high = __uint_as_float(pairs[j] & 0xffff0000u);
#pragma unroll
                for (int r = 0; r < 8; r++) sum[r][0] += values[t + j][r] * low, sum[r][1] += values[t + j][r] * high;
            }
        }
    }
    if (group > 0)
#pragma unroll
        for (int r = 0; r < 8; r++) sums[group - 1][r][lane] = make_float2(sum[r][0], sum[r][1]);
    __syncthreads();
    if (group > 0 || !inside) return;
#pragma unroll
    for (int r = 0; r < 8; r++) {
        float2* own = (float2*)(to + ((long long)e * rank + r0 + r) * width + column);
        float2 all = *own;
        all.x += sum[r][0], all.y += sum[r][1];
#pragma unroll
        for (int g = 0; g < LORA_GROUPS - 1; g++) all.x += sums[g][r][lane].x, all.y += sums[g][r][lane].y;
        *own = all;
    }
}
