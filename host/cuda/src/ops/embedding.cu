// Rows of a table, [vocab, width], which may lie in host memory.
extern "C" __global__ void gather(const bf16* table, const int* ids, View y, int rows, int width) {
    auto [at, i] = place(width);
    if (i < width) *(uint4*)(row(y, at) + i) = *(const uint4*)(table + (long long)ids[at] * width + i);
}
