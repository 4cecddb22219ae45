// What kernels for Hopper's tensor cores have in common (PTX ISA, asynchronous warpgroup level matrix instructions).

// What `cuTensorMapEncodeTiled` made of a matrix, or of rows of a buffer: a kernel copies it box by box, and what a box has beyond it is zero.
struct alignas(64) TensorMap {
    u64 words[16];
};

// A side of a product in shared memory, in rows of 128 bytes whose 16-byte pieces are swapped by the row's last three bits; `leading`
// bytes from one block of 64 columns to the next, where the rows are the inner dimension.
__device__ __forceinline__ u64 descriptor(u32 at, u32 leading) {
    return (u64)(at >> 4 & 0x3fff) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// Sums of a warp group, as a product's operands.
#define FOUR(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SIXTEEN(d, n) FOUR(d, n), FOUR(d, n + 1), FOUR(d, n + 2), FOUR(d, n + 3)

// Registers are as the code before says; products may begin.
__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
