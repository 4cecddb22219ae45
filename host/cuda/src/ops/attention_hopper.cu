// Attention for Hopper in the shape of FlashAttention-3 (Shah et al. 2024): one warp brings tiles to shared memory by the tensor
// memory accelerator, two warp groups multiply with wgmma, and one has its softmax while the other multiplies. Takes the place of
// kernels of attention.cu; the mask and the names are from there.
//
// A block stays on its multiprocessor and takes one piece of work after the other (`piece_of`), longest first, so that the next
// tiles are on their way while results are written. A warp group owns 64 rows of a tile of ROWS rows: queries, in the kernels
// of the output and of dq; keys, in that of dk and dv. Tiles of the other side pass through a ring of STAGES places.
//
// In shared memory a tile lies in panels of 64 columns, rows of 128 bytes whose 16-byte pieces are swapped by the row's last three
// bits: the 128-byte swizzle, in which wgmma reads a tile along its rows and across them. A head whose width is no multiple of 64
// brings columns of the next head along (zeros behind the last), which nobody reads or which end in columns that nobody stores.

#define ROWS 128
#define PANELS ((DIM + 63) / 64)
#define WIDTH ((DIM + 31) / 32 * 32)  // columns of a sum
#define BYTES(rows) (PANELS * (rows) * 128)
#define STAGES 2
#define KEYS 128  // keys of a tile that passes by
#define STEP 64   // queries of a tile, for dk and dv
#define PAIRS 4   // places of the ring through which those pass
#define BLOCK 384

// What `cuTensorMapEncodeTiled` made of rows of a buffer: boxes of 64 columns and 64 rows. Rows behind the last are zero.
struct alignas(64) TensorMap {
    u64 words[16];
};

// A place in a ring, and the parity of its turn.
struct Turn {
    u32 stage = 0, parity = 0;

    __device__ __forceinline__ void advance(u32 stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// Shared memory from the first address that a swizzled tile may have.
__device__ __forceinline__ u32 swizzled_memory() {
    extern __shared__ bf16 shared[];
    return (shared_address(shared) + 1023) / 1024 * 1024;
}

__device__ __forceinline__ void make_barrier(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival, and the bytes that are to come before the barrier opens.
__device__ __forceinline__ void expect(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait_for(u64* barrier, u32 parity) {
    u32 open;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(open) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    } while (!open);
}

// ROWS_OF rows of a head, from a row of the buffer on.
template <int ROWS_OF>
__device__ __forceinline__ void bring(u32 to, const TensorMap& from, int head, int row, u64* barrier) {
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
#pragma unroll
        for (int r = 0; r < ROWS_OF; r += 64)
            asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                             to + (panel * ROWS_OF + r) * 128),
                         "l"(&from), "r"(head * DIM + panel * 64), "r"(row + r), "r"(shared_address(barrier))
                         : "memory");
}

// Registers of a thread: 168 at first, and what the warp group of the loading warp gives the two others take.
template <int N>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

__device__ __forceinline__ u64 descriptor(u32 at, u32 leading) {
    return (u64)(at >> 4 & 0x3fff) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// A tile with its columns as the inner dimension, columns [16 k, 16 k + 16).
template <int ROWS_OF>
__device__ __forceinline__ u64 along(u32 tile, int k) {
    return descriptor(tile + k / 4 * ROWS_OF * 128 + k % 4 * 32, 16);
}

// A tile with its rows as the inner dimension, rows [16 k, 16 k + 16).
template <int ROWS_OF>
__device__ __forceinline__ u64 across(u32 tile, int k) { return descriptor(tile + k * 2048, ROWS_OF * 128); }

#define FOUR(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SIXTEEN(d, n) FOUR(d, n), FOUR(d, n + 1), FOUR(d, n + 2), FOUR(d, n + 3)
#define ALL64(d) SIXTEEN(d, 0), SIXTEEN(d, 4)
#define ALL96(d) ALL64(d), SIXTEEN(d, 8)
#define ALL128(d) ALL96(d), SIXTEEN(d, 12)
#define NAMES64 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES96 NAMES64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES128 NAMES96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// c (+)= a b^T of two tiles in shared memory, columns inside; `more` 0 begins a sum.
#define MULTIPLY(N, A, B, MORE) \
    __device__ __forceinline__ void multiply(float (&c)[N / 8][4], u64 a, u64 b, int more) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" MORE ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES##N "}, %" A ", %" B ", p, 1, 1, 0, 0;\n}" \
                     : ALL##N(c) : "l"(a), "l"(b), "r"(more)); \
    }
MULTIPLY(64, "32", "33", "34")
MULTIPLY(128, "64", "65", "66")

// c += a b with a in registers, rows of b inside. What a holds is made anew for every product: NVRTC 13.0 lets other values
// take the place of registers that a loop reads again and again this way.
#define MULTIPLY_ADD(N, A0, A1, A2, A3, B) \
    __device__ __forceinline__ void multiply_add(float (&c)[N / 8][4], const u32 (&a)[4], u64 b) { \
        asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES##N "}, " \
                     "{%" A0 ",%" A1 ",%" A2 ",%" A3 "}, %" B ", p, 1, 1, 1;\n}" \
                     : ALL##N(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
    }
MULTIPLY_ADD(64, "32", "33", "34", "35", "36")
MULTIPLY_ADD(96, "48", "49", "50", "51", "52")
MULTIPLY_ADD(128, "64", "65", "66", "67", "68")

// Registers are as the code before says; products may begin.
__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING groups of products are in work; then `c` may be read.
template <int PENDING, int N>
__device__ __forceinline__ void done(float (&c)[N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int n = 0; n < N; n++) asm volatile("" : FOUR(c, n)::"memory");
}

// A warp group's rows by 16 K columns as the left side of a product.
template <int K>
struct Left {
    u32 a[K][4];
};

template <int N>
__device__ __forceinline__ Left<N / 2> as_left(const float (&p)[N][4]) {
    Left<N / 2> left;
#pragma unroll
    for (int k = 0; k < N / 2; k++) as_left(left.a[k], p[2 * k], p[2 * k + 1]);
    return left;
}

// scores = rows of `own`, 64 of ROWS, times those of `other`.
template <int N>
__device__ __forceinline__ void scores(float (&c)[N][4], u32 own, u32 other) {
#pragma unroll
    for (int k = 0; k < KSTEPS; k++) multiply(c, along<ROWS>(own, k), along<N * 8>(other, k), k);
    end();
}

// c += p times rows of `other`.
template <int K>
__device__ __forceinline__ void add(float (&c)[WIDTH / 8][4], const Left<K>& p, u32 other) {
#pragma unroll
    for (int k = 0; k < K; k++) multiply_add(c, p.a[k], across<K * 16>(other, k));
    end();
}

// Pieces of work go to blocks one after the other, in every second round from the last block to the first: they come longest
// first, so that every block gets long and short ones.
__device__ __forceinline__ int piece_of(int round) {
    int last = gridDim.x - 1;
    return round * gridDim.x + (round % 2 ? last - blockIdx.x : blockIdx.x);
}

// The assembler moves a wait for products up, over arithmetic that stands before it in the same basic block, and then nothing is left to do
// while they are computed. The loop around the test of a barrier, which is open already, ends the block.
__device__ __forceinline__ void stay(u64* open, u32 parity) { wait_for(open, parity); }

// One lane of every warp says that a warp group has read what the barrier guards.
__device__ __forceinline__ void release(u64* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
}

__device__ __forceinline__ float2 pair_at(u32 at) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(at));
    return pair;
}

// The two warp groups issue products in turns, so that one has its softmax while the other multiplies.
__device__ __forceinline__ void begin_turn(int group) {
#ifdef PINGPONG
    asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
#endif
    begin();
}

__device__ __forceinline__ void end_turn(int group) {
#ifdef PINGPONG
    asm volatile("bar.arrive %0, 256;" ::"r"(1 + (group ^ 1)) : "memory");
#endif
}

// A piece of work, as the loading warp tells it to the others: a tile of rows, a head, and of queries where their answers begin.
struct Piece {
    Tile t;
    int head;
    int starts[ROWS];
};

// What of a tile that passes by a warp group sees.
enum Sight { NONE, PART, WHOLE };

// A tile that passes by, as the loading warp tells it to a warp group.
struct Passing {
    int word;

    __device__ __forceinline__ Passing(int first, bool last, Sight sight) : word(first << 3 | last << 2 | sight) {}
    __device__ __forceinline__ explicit Passing(int told) : word(told) {}
    __device__ __forceinline__ int first() const { return word >> 3; }
    __device__ __forceinline__ bool last() const { return word & 4; }
    __device__ __forceinline__ Sight sight() const { return Sight(word & 3); }
};

// What 64 queries see of some keys. Queries behind the example do not count: their rows are not stored, or have no weight.
__device__ __forceinline__ Sight sight_of(const Tile& t, Begins b, int query, int key, int keys, int window) {
    if (none_visible(t, b, query, 64, key, keys, window)) return NONE;
    return all_visible(t, b, query, min(64, t.length - query), key, keys, window) ? WHOLE : PART;
}

// Scores that queries do not see become nothing. `own` is the first of a thread's two rows, `column` the first of its columns' sixteen
// bytes; ROWS_ARE_QUERIES says which are keys. `begin(i, n)` is where the answer of a query begins.
template <int N, bool ROWS_ARE_QUERIES, bool WINDOW, class Begin>
__device__ __forceinline__ void hide(float (&p)[N][4], const Tile& t, int own, int column, int window, Begin begin) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int mine = own + i / 2 * 8, other = column + n * 8 + i % 2;
            int query = ROWS_ARE_QUERIES ? mine : other, key = ROWS_ARE_QUERIES ? other : mine, start = begin(n, i);
            // No branches: most of a tile is seen.
            bool of_prompt = key < t.prompt, seen = (key <= query) & (of_prompt | (key >= start));
            if (WINDOW) seen &= query - key - (of_prompt ? start - t.prompt : 0) < window;
            p[n][i] = seen ? p[n][i] : -1e30f;
        }
}

template <bool ROWS_ARE_QUERIES, int N, class Begin>
__device__ __forceinline__ void hide(float (&p)[N][4], const Tile& t, int own, int column, int window, Begin begin) {
    column += threadIdx.x % 4 * 2;
    if (window) hide<N, ROWS_ARE_QUERIES, true>(p, t, own, column, window, begin);
    else hide<N, ROWS_ARE_QUERIES, false>(p, t, own, column, window, begin);
}

// exp2_fast, which stays where it stands: before a wait for products that are computed meanwhile.
__device__ __forceinline__ float exp2_now(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The softmax of a thread's two rows, a tile of keys after the other.
struct RowSoftmax {
    float max[2] = {-1e30f, -1e30f}, sum[2] = {};

    // Scores become weights; what was summed before is to shrink by `shrink`.
    __device__ __forceinline__ void step(float (&p)[KEYS / 8][4], float (&shrink)[2], float scale) {
        float top[2] = {max[0], max[1]};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) top[i / 2] = fmaxf(top[i / 2], p[n][i]);
        float shift[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
            // A row that has seen nothing yet has no maximum to subtract.
            shift[r] = top[r] <= -1e30f ? 0.f : top[r] * scale;
            shrink[r] = exp2_fast((max[r] - top[r]) * scale);
            max[r] = top[r];
            sum[r] *= shrink[r];
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[n][i] = exp2_now(p[n][i] * scale - shift[i / 2]);
                sum[i / 2] += p[n][i];
            }
    }
};

// Waits for the next tile of which a warp group sees something, or the last one. Where it passes others by, the place of the tile before goes
// back: they may need it.
template <int N>
__device__ __forceinline__ Passing next_tile(u64* full, u64* empty, const int (&told)[N][2], Turn& turn, int group, int& before) {
    while (true) {
        wait_for(full + turn.stage, turn.parity);
        Passing tile(told[turn.stage][group]);
        if (tile.last() || tile.sight() != NONE) return tile;
        if (before >= 0) {
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            release(empty + before);
            before = -1;
        }
        release(empty + turn.stage);
        turn.advance(N);
    }
}

// out = softmax(scale q k^T) v and lse = ln sum exp, [heads, tokens]. A piece is a head and a tile of ROWS queries. Scores of the next tile
// of keys, which may be the first of the next piece, are computed during the softmax.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    attention(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
              const Tile* tiles, const int* begins, View out, float* lse, int count, Shape s) {
    __shared__ u64 q_full[2], q_empty[2], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    __shared__ Piece told_pieces[2];
    __shared__ int told[STAGES][2];
    u32 qs = swizzled_memory(), ks = qs + 2 * BYTES(ROWS), vs = ks + STAGES * BYTES(KEYS);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            make_barrier(q_full + i, 1 + 32);
            make_barrier(q_empty + i, 8);
        }
        for (int i = 0; i < STAGES; i++) {
            make_barrier(k_full + i, 1);
            make_barrier(v_full + i, 1);
            make_barrier(k_empty + i, 8);
            make_barrier(v_empty + i, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    int pieces = count * s.heads, lane = threadIdx.x % 32;
    Turn turn, own;
    if (threadIdx.x < 128) {
        give_registers<24>();
        if (threadIdx.x >= 32) return;
        for (int round = 0; piece_of(round) < pieces; round++) {
            Tile t = tiles[piece_of(round) / s.heads];
            int h = piece_of(round) % s.heads, last = min(t.first + ROWS, t.length);
            Piece& piece = told_pieces[own.stage];
            wait_for(q_empty + own.stage, own.parity ^ 1);
            for (int i = lane; i < ROWS; i += 32) piece.starts[i] = begin_of(begins, t, t.first + i);
            if (lane == 0) {
                piece.t = t;
                piece.head = h;
                expect(q_full + own.stage, BYTES(ROWS));
                bring<ROWS>(qs + own.stage * BYTES(ROWS), q, h, t.start + t.first - s.cached, q_full + own.stage);
            }
            arrive(q_full + own.stage);
            own.advance(2);
            __syncwarp();
            if (lane == 0) {
                auto next = [&](int key) {
                    while (key < last && none_visible(t, begins_of(piece.starts), t.first, ROWS, key, KEYS, s.window)) key += KEYS;
                    return key;
                };
                for (int key = next(0), after; key < last; key = after) {
                    after = next(key + KEYS);
                    wait_for(k_empty + turn.stage, turn.parity ^ 1);
                    for (int i = 0; i < 2; i++) {
                        Begins b = {piece.starts[i * 64], piece.starts[i * 64 + 63]};
                        told[turn.stage][i] = Passing(key, after >= last, sight_of(t, b, t.first + i * 64, key, KEYS, s.window)).word;
                    }
                    expect(k_full + turn.stage, BYTES(KEYS));
                    bring<KEYS>(ks + turn.stage * BYTES(KEYS), k, h / s.share, t.start + key, k_full + turn.stage);
                    wait_for(v_empty + turn.stage, turn.parity ^ 1);
                    expect(v_full + turn.stage, BYTES(KEYS));
                    bring<KEYS>(vs + turn.stage * BYTES(KEYS), v, h / s.share, t.start + key, v_full + turn.stage);
                    turn.advance(STAGES);
                }
            }
            __syncwarp();
        }
        return;
    }
    take_registers<240>();
    int group = threadIdx.x / 128 - 1, mine = group * 64 + threadIdx.x % 128 / 32 * 16;
    qs += group * 64 * 128;
    float scale = s.scale * LOG2E, o[WIDTH / 8][4] = {}, p[KEYS / 8][4], shrink[2];
    RowSoftmax softmax;
    auto weigh = [&](Passing tile) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) bend(p[n][i], s);
        if (tile.sight() != WHOLE) {
            const Piece& piece = told_pieces[own.stage];
            int row = mine + lane / 4, starts[2] = {piece.starts[row], piece.starts[row + 8]};
            hide<true>(p, piece.t, piece.t.first + row, tile.first(), s.window, [&](int, int i) { return starts[i / 2]; });
        }
        softmax.step(p, shrink, scale);
    };
    auto finish = [&](const Piece& piece) {
        Tile t = piece.t;
        float by[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = softmax.sum[r];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            by[r] = 1.f / sum;
            int row = t.first + mine + lane / 4 + r * 8;
            if (lane % 4 == 0 && row < t.length)
                lse[(long long)piece.head * s.tokens + t.start + row] = softmax.max[r] * s.scale + logf(sum);
        }
        store<DIM>(head(out, piece.head), t, t.first + mine, 0, o, by[0], by[1]);
    };
    if (group == 1) end_turn(group);
    wait_for(q_full + own.stage, own.parity);
    wait_for(k_full + turn.stage, turn.parity);
    Passing tile(told[turn.stage][group]);
    begin_turn(group);
    scores(p, qs + own.stage * BYTES(ROWS), ks + turn.stage * BYTES(KEYS));
    end_turn(group);
    done<0>(p);
    release(k_empty + turn.stage);
    weigh(tile);
    for (int round = 0;;) {
        Left<KEYS / 16> weights = as_left(p);
        Turn now = turn;
        turn.advance(STAGES);
        bool ended = tile.last();
        int before = own.stage;
        if (ended) {
            if (piece_of(++round) >= pieces) break;
            own.advance(2);
            wait_for(q_full + own.stage, own.parity);
        }
        wait_for(k_full + turn.stage, turn.parity);
        tile = Passing(told[turn.stage][group]);
        begin_turn(group);
        scores(p, qs + own.stage * BYTES(ROWS), ks + turn.stage * BYTES(KEYS));
        wait_for(v_full + now.stage, now.parity);
        add(o, weights, vs + now.stage * BYTES(KEYS));
        end_turn(group);
        done<1>(p);
        release(k_empty + turn.stage);
        if (ended) {
            done<0>(o);
            finish(told_pieces[before]);
            release(q_empty + before);
            softmax = RowSoftmax();
        }
        weigh(tile);
        stay(v_full + now.stage, now.parity);
        done<0>(o);
        release(v_empty + now.stage);
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[n][i] = ended ? 0.f : o[n][i] * shrink[i / 2];
    }
    Turn now = turn;
    Left<KEYS / 16> weights = as_left(p);
    now.stage = turn.stage == 0 ? STAGES - 1 : turn.stage - 1;
    now.parity = turn.stage == 0 ? turn.parity ^ 1 : turn.parity;
    wait_for(v_full + now.stage, now.parity);
    begin();
    add(o, weights, vs + now.stage * BYTES(KEYS));
    done<0>(o);
    finish(told_pieces[own.stage]);
}

// dq. A piece is a head and a tile of ROWS queries; keys and values pass by.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    attention_dq(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                 const __grid_constant__ TensorMap dout, const Tile* tiles, const int* begins, const float* lse,
                 const float* delta, View dq, int count, Shape s) {
    __shared__ u64 q_full, q_empty, dout_full, dout_empty, full[STAGES], empty[STAGES];
    __shared__ Piece told_pieces[2];
    __shared__ int told[STAGES][2];
    u32 qs = swizzled_memory(), douts = qs + BYTES(ROWS), pairs = douts + BYTES(ROWS);
    if (threadIdx.x == 0) {
        make_barrier(&q_full, 1 + 32);
        make_barrier(&q_empty, 8);
        make_barrier(&dout_full, 1);
        make_barrier(&dout_empty, 8);
        for (int i = 0; i < STAGES; i++) make_barrier(full + i, 1), make_barrier(empty + i, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    int pieces = count * s.heads, lane = threadIdx.x % 32;
    Turn turn;
    u32 parity = 0;
    if (threadIdx.x < 128) {
        give_registers<24>();
        if (threadIdx.x >= 32) return;
        for (int round = 0; piece_of(round) < pieces; round++, parity ^= 1) {
            Piece& piece = told_pieces[parity];
            Tile t = tiles[piece_of(round) / s.heads];
            int h = piece_of(round) % s.heads, last = min(t.first + ROWS, t.length);
            wait_for(&q_empty, parity ^ 1);
            for (int i = lane; i < ROWS; i += 32) piece.starts[i] = begin_of(begins, t, t.first + i);
            if (lane == 0) {
                piece.t = t;
                piece.head = h;
                expect(&q_full, BYTES(ROWS));
                bring<ROWS>(qs, q, h, t.start + t.first, &q_full);
            }
            arrive(&q_full);
            __syncwarp();
            if (lane == 0) {
                auto next = [&](int key) {
                    while (key < last && none_visible(t, begins_of(piece.starts), t.first, ROWS, key, KEYS, s.window)) key += KEYS;
                    return key;
                };
                bool first = true;
                for (int key = next(0), after; key < last; key = after) {
                    after = next(key + KEYS);
                    wait_for(empty + turn.stage, turn.parity ^ 1);
                    for (int i = 0; i < 2; i++) {
                        Begins b = {piece.starts[i * 64], piece.starts[i * 64 + 63]};
                        told[turn.stage][i] = Passing(key, after >= last, sight_of(t, b, t.first + i * 64, key, KEYS, s.window)).word;
                    }
                    u32 to = pairs + turn.stage * 2 * BYTES(KEYS);
                    expect(full + turn.stage, 2 * BYTES(KEYS));
                    bring<KEYS>(to, k, h / s.share, t.start + key, full + turn.stage);
                    if (first) {
                        wait_for(&dout_empty, parity ^ 1);
                        expect(&dout_full, BYTES(ROWS));
                        bring<ROWS>(douts, dout, h, t.start + t.first, &dout_full);
                        first = false;
                    }
                    bring<KEYS>(to + BYTES(KEYS), v, h / s.share, t.start + key, full + turn.stage);
                    turn.advance(STAGES);
                }
            }
            __syncwarp();
        }
        return;
    }
    take_registers<240>();
    int group = threadIdx.x / 128 - 1, mine = group * 64 + threadIdx.x % 128 / 32 * 16;
    qs += group * 64 * 128;
    douts += group * 64 * 128;
    float scale = s.scale * LOG2E;
    for (int round = 0; piece_of(round) < pieces; round++, parity ^= 1) {
        wait_for(&q_full, parity);
        const Piece& piece = told_pieces[parity];
        float logsum[2], pull[2], sums[WIDTH / 8][4] = {}, p[KEYS / 8][4], dp[KEYS / 8][4];
        own_numbers(logsum, pull, lse, delta, piece.t, mine, piece.head, s);
        int before = -1;
        Passing tile = next_tile(full, empty, told, turn, group, before);
        begin();
        scores(p, qs, pairs + turn.stage * 2 * BYTES(KEYS));
        done<0>(p);
        wait_for(&dout_full, parity);
        for (bool more = true; more;) {
            u32 at = pairs + turn.stage * 2 * BYTES(KEYS);
            begin();
            scores(dp, douts, at + BYTES(KEYS));
            more = !tile.last();
            if (!more) release(&q_empty);
#if SOFTCAP
            float slopes[KEYS / 8][4];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) slopes[n][i] = bend(p[n][i], s);
#endif
            if (tile.sight() != WHOLE) {
                int row = mine + lane / 4, starts[2] = {piece.starts[row], piece.starts[row + 8]};
                hide<true>(p, piece.t, piece.t.first + row, tile.first(), s.window, [&](int, int i) { return starts[i / 2]; });
            }
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) p[n][i] = exp2_now(p[n][i] * scale - logsum[i / 2]);
#ifdef PIN
            u32 sign = 0;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i += 2) sign |= __float_as_uint(p[n][i]) | __float_as_uint(p[n][i + 1]);
            stay(full + turn.stage, turn.parity | sign >> 31);
#else
            stay(full + turn.stage, turn.parity);
#endif
            done<0>(dp);
            if (!more) release(&dout_empty);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    p[n][i] *= dp[n][i] - pull[i / 2];
#if SOFTCAP
                    p[n][i] *= slopes[n][i];
#endif
                }
            Left<KEYS / 16> left = as_left(p);
            begin();
            add(sums, left, at);
            before = turn.stage;
            turn.advance(STAGES);
            if (more) {
                tile = next_tile(full, empty, told, turn, group, before);
                begin();
                scores(p, qs, pairs + turn.stage * 2 * BYTES(KEYS));
            }
            done<0>(p);
            done<0>(sums);
            if (before >= 0) release(empty + before);
        }
        store<DIM>(head(dq, piece.head), piece.t, piece.t.first + mine, 0, sums, s.scale, s.scale);
    }
}

// dk and dv. A piece is a tile of ROWS keys, a key head and one of `parts` runs of the query heads that share it; queries and the
// gradient of the output pass by. Every part has columns of its own in dk and dv, [tokens, kv_heads * parts * DIM].
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    attention_dkv(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                  const __grid_constant__ TensorMap dout, const Tile* tiles, const int* begins, const float* lse,
                  const float* delta, View dk, View dv, int count, int parts, Shape s) {
    __shared__ u64 k_full, k_empty, v_full, v_empty, full[PAIRS], empty[PAIRS];
    __shared__ Piece told_pieces[2];
    __shared__ int told[PAIRS][2], starts[PAIRS][STEP];
    u32 ks = swizzled_memory(), vs = ks + BYTES(ROWS), pairs = vs + BYTES(ROWS);
    u32 numbers = pairs + PAIRS * 2 * BYTES(STEP);  // [place][log-sum, delta][query]
    if (threadIdx.x == 0) {
        make_barrier(&k_full, 1);
        make_barrier(&k_empty, 8);
        make_barrier(&v_full, 1);
        make_barrier(&v_empty, 8);
        for (int i = 0; i < PAIRS; i++) make_barrier(full + i, 1 + 32), make_barrier(empty + i, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    int columns = s.heads / s.share * parts, pieces = count * columns, lane = threadIdx.x % 32;
    Turn turn;
    u32 parity = 0;
    if (threadIdx.x < 128) {
        give_registers<24>();
        if (threadIdx.x >= 32) return;
        for (int round = 0; piece_of(round) < pieces; round++, parity ^= 1) {
            Piece& piece = told_pieces[parity];
            Tile t = tiles[piece_of(round) / columns];
            int column = piece_of(round) % columns, kv = column / parts, part = column % parts;
            auto next = [&](int query) {
                // Without a window, keys of the prompt are hidden from no query behind them.
                if (s.window == 0 && t.first + ROWS <= t.prompt) return query;
                while (query < t.length &&
                       none_visible(t, begins_of(begins, t, query, STEP), query, STEP, t.first, ROWS, s.window))
                    query += STEP;
                return query;
            };
            if (lane == 0) {
                wait_for(&k_empty, parity ^ 1);
                piece.t = t;
                piece.head = column;
                expect(&k_full, BYTES(ROWS));
                bring<ROWS>(ks, k, kv, t.start + t.first, &k_full);
            }
            int h = kv * s.share + s.share * part / parts, end = kv * s.share + s.share * (part + 1) / parts;
            bool first = true;
            for (; h < end; h++)
                for (int query = next(t.first), after; query < t.length; query = after) {
                    after = next(query + STEP);
                    wait_for(empty + turn.stage, turn.parity ^ 1);
                    if (lane == 0) {
                        u32 to = pairs + turn.stage * 2 * BYTES(STEP);
                        expect(full + turn.stage, 2 * BYTES(STEP));
                        bring<STEP>(to, q, h, t.start + query, full + turn.stage);
                        if (first) {
                            wait_for(&v_empty, parity ^ 1);
                            expect(&v_full, BYTES(ROWS));
                            bring<ROWS>(vs, v, kv, t.start + t.first, &v_full);
                        }
                        bring<STEP>(to + BYTES(STEP), dout, h, t.start + query, full + turn.stage);
                    }
                    first = false;
                    float* to = (float*)__cvta_shared_to_generic(numbers) + turn.stage * 2 * STEP;
                    for (int i = lane; i < STEP; i += 32) {
                        // Queries behind the example have no weight: what lies there is of others.
                        bool inside = query + i < t.length;
                        long long place = (long long)h * s.tokens + t.start + query + i;
                        to[i] = inside ? lse[place] * LOG2E : 1e30f;
                        to[STEP + i] = inside ? delta[place] : 0.f;
                        starts[turn.stage][i] = begin_of(begins, t, query + i);
                    }
                    __syncwarp();
                    if (lane < 2) {
                        Sight sight = sight_of(t, begins_of(starts[turn.stage]), query, t.first + lane * 64, 64, s.window);
                        told[turn.stage][lane] = Passing(query, after >= t.length && h + 1 == end, sight).word;
                    }
                    arrive(full + turn.stage);
                    turn.advance(PAIRS);
                }
        }
        return;
    }
    take_registers<240>();
    int group = threadIdx.x / 128 - 1, mine = group * 64 + threadIdx.x % 128 / 32 * 16;
    ks += group * 64 * 128;
    vs += group * 64 * 128;
    numbers += lane % 4 * 8;
    float scale = s.scale * LOG2E;
    for (int round = 0; piece_of(round) < pieces; round++, parity ^= 1) {
        wait_for(&k_full, parity);
        const Piece& piece = told_pieces[parity];
        float dks[WIDTH / 8][4] = {}, dvs[WIDTH / 8][4] = {}, p[STEP / 8][4], dp[STEP / 8][4];
        int before = -1;
        Passing tile = next_tile(full, empty, told, turn, group, before);
        begin();
        scores(p, ks, pairs + turn.stage * 2 * BYTES(STEP));
        done<0>(p);
        wait_for(&v_full, parity);
        for (bool more = true; more;) {
            u32 at = pairs + turn.stage * 2 * BYTES(STEP), of = numbers + turn.stage * 8 * STEP;
            begin();
            scores(dp, vs, at + BYTES(STEP));
            more = !tile.last();
            if (!more) release(&k_empty);
#if SOFTCAP
            float slopes[STEP / 8][4];
#pragma unroll
            for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) slopes[n][i] = bend(p[n][i], s);
#endif
            if (tile.sight() != WHOLE)
                hide<false>(p, piece.t, piece.t.first + mine + lane / 4, tile.first(), s.window,
                            [&](int n, int i) { return starts[turn.stage][n * 8 + lane % 4 * 2 + i % 2]; });
#pragma unroll
            for (int n = 0; n < STEP / 8; n++) {
                float2 logsum = pair_at(of + n * 32);
#pragma unroll
                for (int i = 0; i < 4; i++) p[n][i] = exp2_now(p[n][i] * scale - (i % 2 ? logsum.y : logsum.x));
            }
            Left<STEP / 16> weights = as_left(p);
            stay(full + turn.stage, turn.parity);
            done<0>(dp);
            if (!more) release(&v_empty);
            begin();
            add(dvs, weights, at + BYTES(STEP));
#pragma unroll
            for (int n = 0; n < STEP / 8; n++) {
                float2 pull = pair_at(of + STEP * 4 + n * 32);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    dp[n][i] = p[n][i] * (dp[n][i] - (i % 2 ? pull.y : pull.x));
#if SOFTCAP
                    dp[n][i] *= slopes[n][i];
#endif
                }
            }
            Left<STEP / 16> pushes = as_left(dp);
            begin();
            add(dks, pushes, at);
            before = turn.stage;
            turn.advance(PAIRS);
            if (more) {
                tile = next_tile(full, empty, told, turn, group, before);
                begin();
                scores(p, ks, pairs + turn.stage * 2 * BYTES(STEP));
            }
            done<0>(p);
            done<0>(dvs);
            done<0>(dks);
            if (before >= 0) release(empty + before);
        }
        Tile t = piece.t;
        int column = piece.head;
        store<DIM>(head(dk, column), t, t.first + mine, 0, dks, s.scale, s.scale);
        store<DIM>(head(dv, column), t, t.first + mine, 0, dvs, 1.f, 1.f);
    }
}
