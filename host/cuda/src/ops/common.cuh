// What every kernel needs: bf16 as its bits, vectors of eight, warp sums, the tensor cores' instructions.
// NVRTC comes without headers, so the few instructions that are needed stand here as PTX.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x << 16); }

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

__device__ __forceinline__ bf16 to_bf16(float x) { return (bf16)pack(x, 0.f); }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Eight values of a row: one access of 16 bytes.
struct Eight {
    float v[8];
};

__device__ __forceinline__ Eight unpack8(const uint4& raw) {
    u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
    Eight out;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out.v[2 * i] = __uint_as_float(words[i] << 16);
        out.v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return out;
}

__device__ __forceinline__ Eight load8(const bf16* p) { return unpack8(*(const uint4*)p); }

__device__ __forceinline__ void store8(bf16* p, const Eight& x) {
    *(uint4*)p = make_uint4(pack(x.v[0], x.v[1]), pack(x.v[2], x.v[3]), pack(x.v[4], x.v[5]), pack(x.v[6], x.v[7]));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// 64 random bits that follow from a counter and a seed: for benchmarks.
__device__ __forceinline__ u64 random_bits(u64 counter, u32 seed) {
    u64 h = (counter + 1) * 0x9E3779B97F4A7C15ull + (u64)seed * 0xD1B54A32D192ED03ull;
    h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93ull;
    h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93ull;
    return h ^ (h >> 32);
}

// Columns of a buffer whose rows are `ld` elements apart.
struct View {
    bf16* at;
    long long ld;
};

__device__ __forceinline__ bf16* row(const View& v, long long token) { return v.at + token * v.ld; }

// The row of a thread, and the first of its eight columns, where blocks go along a row and then to the next one.
struct Place {
    long long row;
    int column;
};

__device__ __forceinline__ Place place(int width) {
    int blocks = (width / 8 + blockDim.x - 1) / blockDim.x;
    return {blockIdx.x / blocks, (int)(blockIdx.x % blocks * blockDim.x + threadIdx.x) * 8};
}

// Where kernels are started while those before them end (CUDA C++ Programming Guide, programmatic dependent launch): waits until all that
// those wrote is there, and lets the next one be started. Elsewhere it does nothing.
__device__ __forceinline__ void after_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n griddepcontrol.wait;" ::: "memory");
#endif
}
