// Rows of bf16 as e4m3, each with a scale behind it; matrices of e4m3 transposed, since products of fp8 read both of theirs along k; and in
// bf16, for products of that.

#define HELD 8  // of a row's pieces of eight values, so many a thread stay in registers

// The product of eight values and, with `scales`, as many of those.
__device__ __forceinline__ Eight scaled(const uint4& raw, const float* scales, int column) {
    Eight x = unpack8(raw);
    if (scales) {
        float4 a = *(const float4*)(scales + column), b = *(const float4*)(scales + column + 4);
        x.v[0] *= a.x, x.v[1] *= a.y, x.v[2] *= a.z, x.v[3] *= a.w;
        x.v[4] *= b.x, x.v[5] *= b.y, x.v[6] *= b.z, x.v[7] *= b.w;
    }
    return x;
}

__device__ __forceinline__ float largest(const Eight& x) {
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(x.v[i]));
    return most;
}

__device__ __forceinline__ u32 e4m3x4(float a, float b, float c, float d) {
    u32 out;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}" : "=r"(out) : "f"(a), "f"(b), "f"(c), "f"(d));
    return out;
}

// A block a row of `width` values, which are multiplied by `scales` where there are some. The scale lies behind the codes.
extern "C" __global__ void __launch_bounds__(1024) quantize_fp8(View x, View to, const float* scales, int width) {
    after_previous();
    __shared__ float parts[32];
    const bf16* from = row(x, blockIdx.x);
    unsigned char* codes = (unsigned char*)row(to, blockIdx.x);
    int stride = blockDim.x * 8, begin = threadIdx.x * 8;
    uint4 held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (begin + i * stride < width) held[i] = *(const uint4*)(from + begin + i * stride);
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (begin + i * stride < width) most = fmaxf(most, largest(scaled(held[i], scales, begin + i * stride)));
    for (int column = begin + HELD * stride; column < width; column += stride)
        most = fmaxf(most, largest(scaled(*(const uint4*)(from + column), scales, column)));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < blockDim.x / 32; i++) most = fmaxf(most, parts[i]);
    float scale = most / 448.f, inverse = most > 0.f ? 448.f / most : 0.f;
    auto store = [&](const uint4& raw, int column) {
        Eight v = scaled(raw, scales, column);
#pragma unroll
        for (int i = 0; i < 8; i++) v.v[i] *= inverse;
        *(uint2*)(codes + column) = make_uint2(e4m3x4(v.v[0], v.v[1], v.v[2], v.v[3]), e4m3x4(v.v[4], v.v[5], v.v[6], v.v[7]));
    };
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (begin + i * stride < width) store(held[i], begin + i * stride);
    for (int column = begin + HELD * stride; column < width; column += stride) store(*(const uint4*)(from + column), column);
    if (threadIdx.x == 0) *(float*)(codes + width) = scale;
}

#define SIDE 128

// to[c][r] = from[r][c], bytes, in squares of 128: a thread turns four by four of them.
extern "C" __global__ void __launch_bounds__(256) transpose_fp8(const unsigned char* from, unsigned char* to, int rows, int columns,
                                                                int from_ld, int to_ld) {
    after_previous();
    __shared__ u32 turned[SIDE][SIDE / 4 + 1];
    int row = blockIdx.y * SIDE, column = blockIdx.x * SIDE, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int group = i * 8 + warp;
        u32 v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int r = row + group * 4 + j, c = column + lane * 4;
            v[j] = r < rows && c < columns ? *(const u32*)(from + (long long)r * from_ld + c) : 0;
        }
        u32 a = __byte_perm(v[0], v[1], 0x5140), b = __byte_perm(v[2], v[3], 0x5140);
        u32 c = __byte_perm(v[0], v[1], 0x7362), d = __byte_perm(v[2], v[3], 0x7362);
        turned[lane * 4][group] = __byte_perm(a, b, 0x5410);
        turned[lane * 4 + 1][group] = __byte_perm(a, b, 0x7632);
        turned[lane * 4 + 2][group] = __byte_perm(c, d, 0x5410);
        turned[lane * 4 + 3][group] = __byte_perm(c, d, 0x7632);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16; i++) {
        int c = column + i * 8 + warp, r = row + lane * 4;
        if (c < columns && r < to_ld) *(u32*)(to + (long long)c * to_ld + r) = turned[i * 8 + warp][lane];
    }
}

// Of `write_stacks`: codes in rows that are `ld` bytes apart, and a scale for each.
struct Fp8 {
    const unsigned char* codes;
    const float* scales;
    int ld;

    struct Raw {
        uint2 codes;
        float scale;
    };

    __device__ __forceinline__ Raw at(int r, int eight) const {
        return {*(const uint2*)(codes + (long long)r * ld + eight * 8), scales[r]};
    }

    __device__ __forceinline__ Eight values(const Raw& raw) const {
        Eight out;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 code = (i < 4 ? raw.codes.x : raw.codes.y) >> i % 4 * 8 & 0xff, magnitude = code & 0x7f;
            // Its bits as those of an f32 are the magnitude times 2^-120. The last one is NaN.
            u32 bits = magnitude == 0x7f ? 0x7fc00000u : magnitude << 20;
            out.v[i] = __uint_as_float(bits | code >> 7 << 31) * 0x1p120f * raw.scale;
        }
        return out;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_fp8(const unsigned char* codes, const float* scales, int ld, int inputs,
                                                                     int outputs, View a, View sb, View to, int rank, int height) {
    after_previous();
    write_stacks(Fp8{codes, scales, ld}, inputs, outputs, a, sb, to, rank, height);
}

// Random codes for benchmarks, evenly between the least and the largest value: words of four.
extern "C" __global__ void random_fp8(u32* to, long long words, u32 seed) {
    after_previous();
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (long long)gridDim.x * blockDim.x) {
        u64 h = random_bits(i, seed);
        auto value = [&](int at) { return ((int)(h >> 16 * at & 0xffff) - 32768) * (448.f / 32768.f); };
        to[i] = e4m3x4(value(0), value(1), value(2), value(3));
    }
}
