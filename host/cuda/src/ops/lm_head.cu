// Log-probs from logits in f32, and, in place of the logits, what the backward pass needs of them.

struct Running {
    float max, sum, squares;
};

__device__ __forceinline__ Running merge(Running a, Running b) {
    float max = fmaxf(a.max, b.max);
    float x = __expf(a.max - max), y = __expf(b.max - max);
    return {max, a.sum * x + b.sum * y, a.squares * x * x + b.squares * y * y};
}

// How products with the projection become logits: a bias where there is one, and a soft cap where that is not 0.
struct Head {
    const bf16* bias;
    float softcap;
};

__device__ __forceinline__ float logit(float z, int i, const Head& head) {
    if (head.bias) z += to_float(head.bias[i]);
    return head.softcap > 0.f ? head.softcap * tanhf(z / head.softcap) : z;
}

// Four logits from `i` on. Rows end with products that belong to no token, up to a multiple of eight: those have no weight.
__device__ __forceinline__ float4 logits(const float* z, int i, int vocab, const Head& head) {
    float4 v = *(const float4*)(z + i);
    float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = i + j < vocab ? logit(x[j], i + j, head) : -3e38f;
    return make_float4(x[0], x[1], x[2], x[3]);
}

// A block a row of `columns` products, of which `vocab` become logits z. Leaves logp[row] = z[target] - ln sum exp z and
// log_sum_sq[row] = ln sum p^2. With `grad`, the row becomes d logp / d product in bf16, at its start: [v == target] - p[v], times
// 1 - (z / softcap)^2 where there is a cap.
extern "C" __global__ void log_prob(float* products, const int* targets, float* logp, float* log_sum_sq, int vocab, int columns,
                                    const bf16* bias, float softcap, int grad) {
    __shared__ Running partial[32];
    float* z = products + (long long)blockIdx.x * columns;
    Head head = {bias, softcap};
    Running own = {-1e30f, 0.f, 0.f};
    for (int i = threadIdx.x * 4; i < columns; i += blockDim.x * 4) {
        float4 v = logits(z, i, vocab, head);
        float max = fmaxf(fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)), own.max);
        float scale = __expf(own.max - max), a = __expf(v.x - max), b = __expf(v.y - max), c = __expf(v.z - max),
              d = __expf(v.w - max);
        own = {max, own.sum * scale + (a + b) + (c + d), own.squares * scale * scale + (a * a + b * b) + (c * c + d * d)};
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        Running other = {__shfl_xor_sync(0xffffffffu, own.max, step), __shfl_xor_sync(0xffffffffu, own.sum, step),
                         __shfl_xor_sync(0xffffffffu, own.squares, step)};
        own = merge(own, other);
    }
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = own;
    __syncthreads();
    own = partial[0];
    for (int i = 1; i < blockDim.x / 32; i++) own = merge(own, partial[i]);
    int target = targets[blockIdx.x];
    if (threadIdx.x == 0) {
        logp[blockIdx.x] = logit(z[target], target, head) - own.max - logf(own.sum);
        log_sum_sq[blockIdx.x] = logf(own.squares) - 2.f * logf(own.sum);
    }
    if (!grad) return;
    float inverse = 1.f / own.sum;
    bf16* out = (bf16*)z;
    for (int start = 0; start < columns; start += blockDim.x * 4) {
        int i = start + threadIdx.x * 4;
        float4 v = i < columns ? logits(z, i, vocab, head) : make_float4(0.f, 0.f, 0.f, 0.f);
        // What is written lies below what is read from here on, once the whole block has read.
        __syncthreads();
        if (i < columns) {
            float p[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float bent = softcap > 0.f ? p[j] / softcap : 0.f;
                p[j] = i + j < vocab ? ((i + j == target) - __expf(p[j] - own.max) * inverse) * (1.f - bent * bent) : 0.f;
            }
            *(uint2*)(out + i) = make_uint2(pack(p[0], p[1]), pack(p[2], p[3]));
        }
    }
}

// A row of products becomes logits.
extern "C" __global__ void to_logits(float* z, int vocab, const bf16* bias, float softcap) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < vocab) z[i] = logit(z[i], i, {bias, softcap});
}

// Rows of d logp / d hidden times d loss / d logp.
extern "C" __global__ void scale_rows(View x, const float* by, int rows, int width) {
    auto [at, i] = place(width);
    if (i >= width) return;
    Eight v = load8(row(x, at) + i);
#pragma unroll
    for (int j = 0; j < 8; j++) v.v[j] *= by[at];
    store8(row(x, at) + i, v);
}
