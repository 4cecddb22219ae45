// W of linears in nf4: codes of four bits, times the scale of their 64, which is an 8-bit code itself. VALUES and SCALES, what the codes
// stand for, come before this file.

#define BLOCK 64         // values that share a scale
#define SCALE_BLOCK 256  // scales that share theirs

__device__ const float values_of[16] = {VALUES};
__device__ const float scales_of[256] = {SCALES};

// W [outputs, inputs] of the members of a stack, one behind the other.
struct Nf4 {
    const u32* codes;             // eight in a word, the first in the high half of the lowest byte
    const unsigned char* scales;  // of every block
    const float2* groups;         // of every SCALE_BLOCK scales of a member, their scale and what is added
    const int2* members;          // first block and first group
    int count, inputs, outputs;
};

#define NF4_PARAMETERS                                                                                             \
    const u32 *codes, const unsigned char *scales, const float2 *groups, const int2 *members, int count, int inputs, int outputs
#define NF4 {codes, scales, groups, members, count, inputs, outputs}

// What the codes stand for, for a block of threads.
struct Tables {
    float values[16], scales[256];

    __device__ __forceinline__ void fill() {
        scales[threadIdx.x] = scales_of[threadIdx.x];
        if (threadIdx.x < 16) values[threadIdx.x] = values_of[threadIdx.x];
        __syncthreads();
    }
};

// The scale of a block, rounded after the product and after the sum, as bitsandbytes does.
__device__ __forceinline__ float scale_of(const Nf4& w, const Tables& tables, int block) {
    int m = w.count - 1;
    while (m > 0 && block < w.members[m].x) m--;
    int2 first = w.members[m];
    float2 group = w.groups[first.y + (block - first.x) / SCALE_BLOCK];
    return __fadd_rn(__fmul_rn(tables.scales[w.scales[block]], group.x), group.y);
}

__device__ __forceinline__ Eight values8(u32 codes, float scale, const Tables& tables) {
    Eight out;
#pragma unroll
    for (int i = 0; i < 8; i++) out.v[i] = tables.values[codes >> (i ^ 1) * 4 & 15] * scale;
    return out;
}

// Of `write_stacks`.
struct Nf4Eights {
    const Nf4& w;
    const Tables& tables;

    struct Raw {
        u32 codes;
        float scale;
    };

    __device__ __forceinline__ Raw at(int r, int eight) const {
        u32 word = (u32)r * (w.inputs / 8) + eight;
        return {w.codes[word], scale_of(w, tables, word / (BLOCK / 8))};
    }

    __device__ __forceinline__ Eight values(const Raw& raw) const { return values8(raw.codes, raw.scale, tables); }
};

extern "C" __global__ void __launch_bounds__(THREADS) nf4_dequantize(NF4_PARAMETERS, View a, View sb, View to, int rank, int height) {
    __shared__ Tables tables;
    Nf4 w = NF4;
    tables.fill();
    after_previous();
    write_stacks(Nf4Eights{w, tables}, inputs, outputs, a, sb, to, rank, height);
}

#define ROWS 2  // rows of W that a warp has at once
#define WARPS (THREADS / 32)

// The products of x [inputs] with rows of W, in f32, and those of u behind it with s·B; to every lane. A lane reads WORDS words of
// codes at once, which are of one block.
template <int WORDS>
__device__ __forceinline__ void products(float (&sum)[ROWS], const int (&rows)[ROWS], const Nf4& w, const View& sb, const bf16* x,
                                         int rank, const Tables& tables) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++) sum[r] = 0.f;
    for (int c = lane * 8 * WORDS; c < w.inputs; c += 32 * 8 * WORDS) {
        u32 codes[ROWS][WORDS];
        float scale[ROWS], part[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            u32 at = (u32)rows[r] * w.inputs + c;
            const u32* from = w.codes + at / 8;
            if constexpr (WORDS == 4) {
                uint4 four = *(const uint4*)from;
                codes[r][0] = four.x, codes[r][1] = four.y, codes[r][2] = four.z, codes[r][3] = four.w;
            } else {
                codes[r][0] = *from;
            }
            scale[r] = scale_of(w, tables, at / BLOCK);
            part[r] = 0.f;
        }
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            Eight values = load8(x + c + i * 8);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    part[r] = fmaf(tables.values[codes[r][i] >> (k ^ 1) * 4 & 15], values.v[k], part[r]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) sum[r] = fmaf(part[r], scale[r], sum[r]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        for (int i = lane; i < rank; i += 32) sum[r] = fmaf(to_float(row(sb, rows[r])[i]), to_float(x[w.inputs + i]), sum[r]);
        sum[r] = warp_sum(sum[r]);
    }
}

__device__ __forceinline__ void products(float (&sum)[ROWS], const int (&rows)[ROWS], const Nf4& w, const View& sb, const bf16* x,
                                         int rank, const Tables& tables) {
    // Words of a row that begins anywhere may be of two blocks.
    if (w.inputs % 32 == 0) products<4>(sum, rows, w, sb, x, rank, tables);
    else products<1>(sum, rows, w, sb, x, rank, tables);
}

// y = W x + sB u, plus c and a bias where they are given. Values are not rounded to bf16 before they are multiplied.
extern "C" __global__ void __launch_bounds__(THREADS)
    nf4_gemv(NF4_PARAMETERS, View sb, const bf16* x, const bf16* c, const bf16* bias, bf16* y, int rank) {
    __shared__ Tables tables;
    Nf4 w = NF4;
    tables.fill();
    after_previous();
    int own = threadIdx.x % 32;
    for (int first = (blockIdx.x * WARPS + threadIdx.x / 32) * ROWS; first < outputs; first += gridDim.x * WARPS * ROWS) {
        int rows[ROWS] = {first, first + 1};
        float sum[ROWS];
        products(sum, rows, w, sb, x, rank, tables);
        if (own >= ROWS) continue;
        float all = own == 0 ? sum[0] : sum[1];
        if (bias) all += to_float(bias[first + own]);
        if (c) all += to_float(c[first + own]);
        y[first + own] = to_bf16(all);
    }
}

// h = act(G x) (U x): W is [2 width, inputs], gate and then up.
extern "C" __global__ void __launch_bounds__(THREADS)
    nf4_gemv_gated(NF4_PARAMETERS, View sb, const bf16* x, bf16* h, int rank, int activation, float limit) {
    __shared__ Tables tables;
    Nf4 w = NF4;
    tables.fill();
    after_previous();
    int width = outputs / 2;
    for (int at = blockIdx.x * WARPS + threadIdx.x / 32; at < width; at += gridDim.x * WARPS) {
        int rows[ROWS] = {at, at + width};
        float sum[ROWS];
        products(sum, rows, w, sb, x, rank, tables);
        if (threadIdx.x % 32 == 0) h[at] = to_bf16(activate(sum[0], activation, limit).value * sum[1]);
    }
}

// Random codes and scales, for benchmarks: words of random bits.
extern "C" __global__ void nf4_random(u32* to, long long words, u32 seed) {
    after_previous();
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (long long)gridDim.x * blockDim.x) {
        to[i] = (u32)random_bits(i, seed);
    }
}
