// W of experts in mxfp4: e2m1, times a power of two for every 32 of a row.

#define BLOCK 32  // values that share a scale

__device__ const float values_of[16] = {VALUES};

struct Mxfp4 {
    const u32* codes;             // eight in a word, the first in the low half of the lowest byte; four words to a block
    const unsigned char* scales;  // of every block, the exponent plus 127
    int blocks;                   // of a row
    const float* table;

    struct Raw {
        u32 codes, exponent;
    };

    __device__ __forceinline__ Raw at(int r, int eight) const {
        long long block = (long long)r * blocks + eight / (BLOCK / 8);
        return {codes[block * (BLOCK / 8) + eight % (BLOCK / 8)], scales[block]};
    }

    // Exact in bf16, whatever the scale.
    __device__ __forceinline__ Eight values(const Raw& raw) const {
        u32 bits = raw.exponent == 0 ? 1u << 22 : raw.exponent == 255 ? 0x7fc00000u : raw.exponent << 23;
        float scale = __uint_as_float(bits);
        Eight out;
#pragma unroll
        for (int i = 0; i < 8; i++) out.v[i] = table[raw.codes >> 4 * i & 15] * scale;
        return out;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) mxfp4_dequantize(const u32* codes, const unsigned char* scales, int inputs,
                                                                       int outputs, View a, View sb, View to, int rank, int height) {
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = values_of[threadIdx.x];
    __syncthreads();
    after_previous();
    write_stacks(Mxfp4{codes, scales, (inputs + BLOCK - 1) / BLOCK, table}, inputs, outputs, a, sb, to, rank, height);
}

// Random codes, for benchmarks: words of random bits.
extern "C" __global__ void mxfp4_random(u32* to, long long words, u32 seed) {
    after_previous();
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (long long)gridDim.x * blockDim.x) {
        to[i] = (u32)random_bits(i, seed);
    }
}
