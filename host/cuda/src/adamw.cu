// The adapter: its sum of squares, its step, and its way to and from the stacked matrices.

// Partial sums of g^2, one a block, in a fixed order.
extern "C" __global__ void sum_squares(const float* g, double* partial, long long count) {
    __shared__ double sums[256];
    double own = 0.0;
    for (long long i = (long long)blockIdx.x * 256 + threadIdx.x; i < count; i += (long long)gridDim.x * 256)
        own += (double)g[i] * g[i];
    sums[threadIdx.x] = own;
    for (int step = 128; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    }
    if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}

// A parameter and its moments after a step of AdamW (Loshchilov and Hutter 2019, algorithm 2) as torch.optim.AdamW computes it.
struct AdamW {
    float keep, size, root, b1, r1, b2, r2, eps;

    __device__ void step(float d, float& p, float& m, float& v) const {
        m = b1 * m + r1 * d;
        v = b2 * v + r2 * d * d;
        p = p * keep - size * m / (sqrtf(v) / root + eps);
    }
};

// One LoRA matrix in the flat buffer of parameters, `rows` by `columns`, and its place in a stacked matrix; or one of every expert, `height`
// rows each, whose places are `steps` apart.
struct Part {
    long long flat;      // offset in the flat buffer
    bf16* stacked;       // first element in the stacked matrix of weights
    float* gradient;     // first element in the stacked gradient
    long long stacked_ld, gradient_row, gradient_column;
    long long stacked_step, gradient_step;
    int rows, columns;
    int height;
    float scale;
    int group;           // 0 A, 1 B, 2 what is subtracted, which has no gradient and stays what it is
    int unused;

    __device__ bf16& stacked_at(int i) const {
        int row = i / columns;
        return stacked[row / height * stacked_step + row % height * stacked_ld + i % columns];
    }
    __device__ float gradient_at(int i) const {
        int row = i / columns;
        return gradient[row / height * gradient_step + row % height * gradient_row + i % columns * gradient_column];
    }
};

// A step of every matrix, A and B at their own rates; `clip` scales the gradient.
extern "C" __global__ void adamw(const Part* parts, float* p, const float* g, float* m, float* v, float clip, float keep_a,
                                 float size_a, float keep_b, float size_b, float root, float b1, float r1, float b2, float r2,
                                 float eps) {
    Part part = parts[blockIdx.y];
    if (part.group == 2) return;
    AdamW adam = {part.group ? keep_b : keep_a, part.group ? size_b : size_a, root, b1, r1, b2, r2, eps};
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < part.rows * part.columns; i += gridDim.x * blockDim.x) {
        long long at = part.flat + i;
        adam.step(g[at] * clip, p[at], m[at], v[at]);
    }
}

// Of every block 1 where that step would make a number that is not finite, else 0.
extern "C" __global__ void adamw_overflows(const Part* parts, const float* p, const float* g, const float* m, const float* v,
                                           float clip, float keep_a, float size_a, float keep_b, float size_b, float root,
                                           float b1, float r1, float b2, float r2, float eps, int count, double* partial) {
    int overflows = 0;
    for (int which = blockIdx.x; which < count; which += gridDim.x) {
        Part part = parts[which];
        if (part.group == 2) continue;
        AdamW adam = {part.group ? keep_b : keep_a, part.group ? size_b : size_a, root, b1, r1, b2, r2, eps};
        for (int i = threadIdx.x; i < part.rows * part.columns; i += 256) {
            long long at = part.flat + i;
            float q = p[at], first = m[at], second = v[at];
            adam.step(g[at] * clip, q, first, second);
            overflows |= !(isfinite(q) && isfinite(first) && isfinite(second));
        }
    }
    overflows = __syncthreads_or(overflows);
    if (threadIdx.x == 0) partial[blockIdx.x] = overflows;
}

// Parameters to bf16 in the stacked matrices.
extern "C" __global__ void spread(const Part* parts, const float* params) {
    Part part = parts[blockIdx.y];
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < part.rows * part.columns; i += gridDim.x * blockDim.x)
        part.stacked_at(i) = to_bf16(params[part.flat + i] * part.scale);
}

// Stacked gradients to the flat buffer.
extern "C" __global__ void collect(const Part* parts, float* flat) {
    Part part = parts[blockIdx.y];
    if (part.group == 2) return;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < part.rows * part.columns; i += gridDim.x * blockDim.x)
        flat[part.flat + i] = part.scale * part.gradient_at(i);
}

// Values of a normal-like spread from a counter, for benchmarks: the sum of four uniform numbers.
extern "C" __global__ void random(View x, long long rows, int width, float deviation, u32 seed) {
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < rows * width;
         i += (long long)gridDim.x * blockDim.x) {
        u64 h = random_bits(i, seed);
        float sum = (float)(h & 0xffff) + (float)(h >> 16 & 0xffff) + (float)(h >> 32 & 0xffff) + (float)(h >> 48);
        x.at[i / width * x.ld + i % width] = to_bf16((sum / 65536.f - 2.f) * 1.7320508f * deviation);
    }
}
