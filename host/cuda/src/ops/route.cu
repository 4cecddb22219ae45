// Scores of experts, the choice of a token's best ones, and the weights of those; a warp a token. The choice is a function of the logits
// alone, so that it is the same whenever it is made. A lane has every 32nd expert.

#define MOST 16  // experts of a lane
#define NONE -__int_as_float(0x7f800000)

struct Route {
    int experts, columns;  // behind the experts there are zeros
    int top_k, scoring;    // as SCORINGS of route.rs
    int normalizes, groups, top_groups, sums_two;
    float eps, scale;
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// The best value of all lanes, and of equal ones the lowest index.
__device__ __forceinline__ int best(float value, int index) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, value, step);
        int at = __shfl_xor_sync(0xffffffffu, index, step);
        if (other > value || (other == value && at < index)) value = other, index = at;
    }
    return index;
}

struct Scores {
    float score[MOST];  // 0 behind the last expert
    u32 chosen;         // a bit for each of the lane's experts
    float sum;          // of the chosen scores, with eps, where they are normalised; else 1
};

__device__ __forceinline__ Scores choose(const Route& r, const bf16* logits, const float* bias) {
    int lane = threadIdx.x % 32;
    Scores out = {};
    float value[MOST], top = NONE, sum = 0.f;
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        int e = i * 32 + lane;
        value[i] = e < r.experts ? to_float(logits[e]) : NONE;
        top = fmaxf(top, value[i]);
    }
    top = warp_max(top);
    if (r.scoring != 1) {
#pragma unroll
        for (int i = 0; i < MOST; i++) sum += out.score[i] = expf(value[i] - top);
        sum = r.scoring == 0 ? warp_sum(sum) : 1.f;
    }
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        int e = i * 32 + lane;
        out.score[i] = r.scoring == 1 ? (e < r.experts ? 1.f / (1.f + expf(-value[i])) : 0.f) : out.score[i] / sum;
        if (e < r.experts) value[i] = (r.scoring == 2 ? value[i] : out.score[i]) + (bias ? bias[e] : 0.f);
    }
    if (r.top_groups < r.groups) {
        // Of every group its best, or the sum of its two best; lanes have groups in turn, then those that are not chosen are left out.
        int own = r.experts / r.groups;
        u64 kept = 0;
        float of_group[2] = {NONE, NONE};
        for (int g = 0; g < r.groups; g++) {
            float total = 0.f;
            int first = -1;
            for (int turn = 0; turn <= r.sums_two; turn++) {
                float most = NONE;
                int at = 1 << 30;
#pragma unroll
                for (int i = 0; i < MOST; i++) {
                    int e = i * 32 + lane;
                    if (e / own == g && e < r.experts && e != first && value[i] > most) most = value[i], at = e;
                }
                first = best(most, at);
                total += warp_max(most);
            }
            if (g % 32 == lane) of_group[g / 32] = total;
        }
        for (int n = 0; n < r.top_groups; n++) {
            float most = NONE;
            int at = 1 << 30;
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (of_group[i] > most) most = of_group[i], at = i * 32 + lane;
            int g = best(most, at);
            kept |= 1ull << g;
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (i * 32 + lane == g) of_group[i] = NONE;
        }
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            int e = i * 32 + lane;
            if (e < r.experts && !(kept >> e / own & 1)) value[i] = NONE;
        }
    }
    for (int n = 0; n < r.top_k; n++) {
        float most = NONE;
        int at = 1 << 30;
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (i * 32 + lane < r.experts && !(out.chosen >> i & 1) && value[i] > most) most = value[i], at = i * 32 + lane;
        at = best(most, at);
        if (at % 32 == lane && at < r.experts) out.chosen |= 1u << at / 32;
    }
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < MOST; i++) sum += out.chosen >> i & 1 ? out.score[i] : 0.f;
    sum = warp_sum(sum);
    if (r.scoring == 2) {
#pragma unroll
        for (int i = 0; i < MOST; i++) out.score[i] = out.chosen >> i & 1 ? out.score[i] / sum : 0.f;
        sum = 1.f;
    }
    out.sum = r.normalizes ? sum + r.eps : 1.f;
    return out;
}

extern "C" __global__ void route(View logits, View weights, Route r, const float* bias, const float* factors, int tokens) {
    int token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= tokens) return;
    Scores of = choose(r, row(logits, token), bias);
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        int e = i * 32 + lane;
        if (e >= r.columns) break;
        float weight = of.chosen >> i & 1 ? of.score[i] / of.sum * r.scale * (factors ? factors[e] : 1.f) : 0.f;
        row(weights, token)[e] = to_bf16(weight);
    }
}

// What a router does with tokens, each of which is in so many texts, by expert: the tokens that are sent to it, then the sums of the
// probabilities that they give it. A block has every so-many-th token, and leaves its sums in its part.
extern "C" __global__ void route_load(View logits, Route r, const int* texts, float* parts, int tokens) {
    __shared__ float sums[2][32 * MOST];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    float count[MOST] = {}, prob[MOST] = {};
    for (int token = blockIdx.x * warps + warp; token < tokens; token += gridDim.x * warps) {
        Scores of = choose(r, row(logits, token), nullptr);
        float weight = texts[token];
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            count[i] += of.chosen >> i & 1 ? weight : 0.f;
            prob[i] += weight * of.score[i];
        }
    }
    for (int turn = 0; turn < warps; turn++) {
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            int e = i * 32 + lane;
            if (turn != warp) continue;
            sums[0][e] = count[i] + (turn > 0 ? sums[0][e] : 0.f);
            sums[1][e] = prob[i] + (turn > 0 ? sums[1][e] : 0.f);
        }
        __syncthreads();
    }
    float* part = parts + (u64)blockIdx.x * 2 * r.experts;
    for (int i = threadIdx.x; i < 2 * r.experts; i += blockDim.x) part[i] = sums[i / r.experts][i % r.experts];
}

// Adds so many parts, in their order.
extern "C" __global__ void route_load_sum(const float* parts, int count, int values, double* load) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= values) return;
    double sum = load[i];
    for (int part = 0; part < count; part++) sum += parts[part * values + i];
    load[i] = sum;
}

// The softmax of a token's logits, 0 behind the last expert.
__device__ __forceinline__ void softmax(const Route& r, const bf16* logits, float* prob) {
    int lane = threadIdx.x % 32;
    float top = NONE, sum = 0.f;
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        int e = i * 32 + lane;
        prob[i] = e < r.experts ? to_float(logits[e]) : NONE;
        top = fmaxf(top, prob[i]);
    }
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < MOST; i++) sum += prob[i] = expf(prob[i] - top);
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < MOST; i++) prob[i] /= sum;
}

// `dlogits` may be `dweights`. With `dprobs`, the derivatives of an auxiliary loss by a token's probabilities, also of that loss, as often as
// the token is in a text.
extern "C" __global__ void route_vjp(View logits, View dweights, View dlogits, Route r, const float* bias, const float* factors,
                                     int tokens, const float* dprobs, const int* texts) {
    int token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= tokens) return;
    Scores of = choose(r, row(logits, token), bias);
    float d[MOST], mean = 0.f;
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        int e = i * 32 + lane;
        d[i] = 0.f;
        if (of.chosen >> i & 1) d[i] = to_float(row(dweights, token)[e]) * r.scale * (factors ? factors[e] : 1.f) / of.sum;
        mean += d[i] * of.score[i];
    }
    // By the scores, where they are normalised, then by the logits.
    mean = warp_sum(mean);
    if (r.normalizes) {
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (of.chosen >> i & 1) d[i] -= mean / of.sum;
        mean = 0.f;
#pragma unroll
        for (int i = 0; i < MOST; i++) mean += d[i] * of.score[i];
        mean = warp_sum(mean);
    }
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        float s = of.score[i];
        d[i] = r.scoring == 1 ? d[i] * s * (1.f - s) : s * (d[i] - mean);
    }
    if (dprobs) {
        float prob[MOST], along = 0.f, weight = texts[token];
        softmax(r, row(logits, token), prob);
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (i * 32 + lane < r.experts) along += prob[i] * dprobs[i * 32 + lane];
        along = warp_sum(along);
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (i * 32 + lane < r.experts) d[i] += weight * prob[i] * (dprobs[i * 32 + lane] - along);
    }
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        int e = i * 32 + lane;
        if (e >= r.columns) break;
        row(dlogits, token)[e] = to_bf16(d[i]);
    }
}
