// Matmuls of one row, y = W x, which take the time in which W is read. A block has two rows of W: every thread reads 16 bytes of both
// AHEAD times before it multiplies, so that enough bytes are on their way. Sums are f32, of a thread, a warp, the block, always in this
// order.

#define THREADS 256
#define ROWS 2
#define AHEAD 2
#define STEP (THREADS * 8)  // columns that a block reads at once

__device__ __forceinline__ float multiply(float sum, u32 a, u32 b) {
    sum = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), sum);
    return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), sum);
}

// The products of x with rows of W, to every thread.
__device__ __forceinline__ void products(float (&sum)[ROWS], const bf16* const (&w)[ROWS], const bf16* x, int k) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) sum[r] = 0.f;
    for (int from = threadIdx.x * 8; from < k; from += STEP * AHEAD) {
        uint4 weights[AHEAD][ROWS], values[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int i = from + a * STEP;
#pragma unroll
            for (int r = 0; r < ROWS; r++) weights[a][r] = i < k ? load_once(w[r] + i) : make_uint4(0, 0, 0, 0);
            values[a] = i < k ? *(const uint4*)(x + i) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int inside = k - from - a * STEP;
            // What lies behind a row is anything, not numbers alone.
            if (inside > 0 && inside < 8) {
                cut(values[a], inside);
#pragma unroll
                for (int r = 0; r < ROWS; r++) cut(weights[a][r], inside);
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                sum[r] = multiply(sum[r], weights[a][r].x, values[a].x);
                sum[r] = multiply(sum[r], weights[a][r].y, values[a].y);
                sum[r] = multiply(sum[r], weights[a][r].z, values[a].z);
                sum[r] = multiply(sum[r], weights[a][r].w, values[a].w);
            }
        }
    }
    __shared__ float warps[ROWS][THREADS / 32];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        sum[r] = warp_sum(sum[r]);
        if (threadIdx.x % 32 == 0) warps[r][threadIdx.x / 32] = sum[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        sum[r] = 0.f;
#pragma unroll
        for (int i = 0; i < THREADS / 32; i++) sum[r] += warps[r][i];
    }
}

__device__ __forceinline__ void store(bf16* y, float x) { *y = to_bf16(x); }
__device__ __forceinline__ void store(float* y, float x) { *y = x; }

template <typename T>
__device__ __forceinline__ void gemv_of(const bf16* x, const View& w, const bf16* c, const bf16* bias, T* y, int n, int k) {
    int first = blockIdx.x * ROWS;
    const bf16* rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) rows[r] = row(w, min(first + r, n - 1));
    float sum[ROWS];
    products(sum, rows, x, k);
    int own = threadIdx.x, at = first + own;
    if (own >= ROWS || at >= n) return;
    float all = own == 0 ? sum[0] : sum[1];
    if (bias) all += to_float(bias[at]);
    if (c) all += to_float(c[at]);
    store(y + at, all);
}

// y = W x, plus a bias and c where they are given; W is [n, k].
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    gemv(const bf16* x, View w, const bf16* c, const bf16* bias, bf16* y, int n, int k) {
    after_previous();
    gemv_of(x, w, c, bias, y, n, k);
}

// The same in f32.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    gemv_wide(const bf16* x, View w, const bf16* c, const bf16* bias, float* y, int n, int k) {
    after_previous();
    gemv_of(x, w, c, bias, y, n, k);
}

// h = act(G x) (U x): W is [2 width, k], gate and then up.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    gemv_gated(const bf16* x, View w, bf16* h, int width, int k, int activation, float limit) {
    after_previous();
    const bf16* rows[ROWS] = {row(w, blockIdx.x), row(w, blockIdx.x + width)};
    float sum[ROWS];
    products(sum, rows, x, k);
    if (threadIdx.x == 0) store(h + blockIdx.x, activate(sum[0], activation, limit).value * sum[1]);
}
