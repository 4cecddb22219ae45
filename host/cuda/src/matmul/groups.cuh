// Rows of groups, one group after the other, such as those of experts: tiles of rows that have rows of one group each.

#define MOST_GROUPS 512

struct Groups {
    int begins[MOST_GROUPS + 1];  // of every group its first row, and behind the last where its rows end
    int tiles[MOST_GROUPS + 1];   // the same of tiles
    int count;
    int apart;                    // rows from a group's weights to the next one's

    // All threads of a block, once: `from` has where rows begin, `height` is that of a tile.
    __device__ __forceinline__ void cut(const int* from, int groups, int rows_apart, int height) {
        for (int i = threadIdx.x; i <= groups; i += blockDim.x) begins[i] = from[i];
        if (threadIdx.x == 0) count = groups, apart = rows_apart;
        __syncthreads();
        if (threadIdx.x < 32) {
            constexpr int OWN = MOST_GROUPS / 32;  // groups of a lane
            int first = threadIdx.x * OWN, sum = 0;
            auto of = [&](int g) { return g < groups ? (begins[g + 1] - begins[g] + height - 1) / height : 0; };
            for (int i = 0; i < OWN; i++) sum += of(first + i);
            int end = sum;
            for (int step = 1; step < 32; step *= 2) {
                int before = __shfl_up_sync(0xffffffffu, end, step);
                if (threadIdx.x >= step) end += before;
            }
            for (int i = 0, at = end - sum; i < OWN; at += of(first + i), i++)
                if (first + i < groups) tiles[first + i] = at;
            if (threadIdx.x == 31) tiles[groups] = end;
        }
        __syncthreads();
    }

    // The group of a tile.
    __device__ __forceinline__ int of(int tile) const {
        int group = 0;
        for (int step = MOST_GROUPS / 2; step > 0; step /= 2)
            if (group + step < count && tiles[group + step] <= tile) group += step;
        return group;
    }
};
