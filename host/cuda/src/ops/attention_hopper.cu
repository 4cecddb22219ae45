// Attention for Hopper in the shape of FlashAttention-3 (Shah et al. 2024): one warp copies tiles to shared memory (TMA), two warp
// groups multiply them (wgmma), and one has its softmax while the other multiplies. Takes the place of kernels of attention.cu; the
// mask and the names are from there. The backward pass is in attention_hopper_vjp.cu.
//
// A block stays on its multiprocessor and takes one piece of work after the other, so that the next tiles are on their way while
// results are written. A warp group owns 64 rows: queries, for the output and for dq; keys, for dk and dv. Tiles of the other side
// pass by in a ring of places: `full` barriers open when a place has its tile, `empty` ones when both groups have read it.
//
// In shared memory a tile lies in panels of 64 columns, rows of 128 bytes whose 16-byte pieces are swapped by the row's last three
// bits: the 128-byte swizzle, in which wgmma reads a tile along its rows and across them. A head whose width is no multiple of 64
// brings columns of the next head along (zeros behind the last): nobody reads them, or they end in columns that nobody stores.
// Rows behind an example are the next one's, or zeros: they are hidden, or are not stored.

#define WIDE_HEAD (DIM > 128)
#define ROWS 128  // queries of a piece
#define PANELS(columns) (((columns) + 63) / 64)
#define WIDTH(columns) (((columns) + 31) / 32 * 32)  // columns of a sum
#define BYTES(rows) (PANELS(DIM) * (rows) * 128)      // of queries or keys
#define VALUE_BYTES(rows) (PANELS(VALUE_DIM) * (rows) * 128)
#define PAIR_BYTES(rows) (BYTES(rows) + VALUE_BYTES(rows))  // of queries or keys, and behind them what lies beside them
#define STAGES 2                                   // places of a ring of keys
#define Q_PLACES (WIDE_HEAD ? 1 : 2)               // places of queries, for the output
#define KEYS (VALUE_DIM > 128 ? 64 : 128)          // keys of a tile that passes by, for the output
#define DQ_KEYS (DIM > 192 ? 32 : WIDE_HEAD ? 64 : 128)  // the same for dq
#define OWN_KEYS (WIDE_HEAD ? 64 : 128)   // keys of a piece, for dk and dv
#define STEP 64                           // queries of a tile that passes by, for dk and dv
#define PAIRS (WIDE_HEAD ? 2 : 4)         // places of a ring of those
#define BLOCK 384

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

template <int N>
__device__ __forceinline__ void make_barriers(u64 (&barriers)[N], int arrivals) {
    for (int i = 0; i < N; i++) make_barrier(barriers + i, arrivals);
}

// Barriers that one thread has made are there for all, and for copies.
__device__ __forceinline__ void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
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

// ROWS_OF rows of a head of so many columns, from a row of the buffer on.
template <int ROWS_OF, int COLUMNS = DIM>
__device__ __forceinline__ void bring(u32 to, const TensorMap& from, int head, int row, u64* barrier) {
#pragma unroll
    for (int panel = 0; panel < PANELS(COLUMNS); panel++)
#pragma unroll
        for (int r = 0; r < ROWS_OF; r += 64)  // a box
            asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                             to + (panel * ROWS_OF + r) * 128),
                         "l"(&from), "r"(head * COLUMNS + panel * 64), "r"(row + r), "r"(shared_address(barrier))
                         : "memory");
}

// Registers of a thread: 168 at first, and what the warp group of the loading warp gives the two others take.
template <int N>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// A tile with its columns as the inner dimension, columns [16 k, 16 k + 16).
template <int ROWS_OF>
__device__ __forceinline__ u64 along(u32 tile, int k) {
    return descriptor(tile + k / 4 * ROWS_OF * 128 + k % 4 * 32, 16);
}

// A tile with its rows as the inner dimension, rows [16 k, 16 k + 16).
template <int ROWS_OF>
__device__ __forceinline__ u64 across(u32 tile, int k) { return descriptor(tile + k * 2048, ROWS_OF * 128); }

#define ALL32(d) SIXTEEN(d, 0)
#define ALL64(d) ALL32(d), SIXTEEN(d, 4)
#define ALL96(d) ALL64(d), SIXTEEN(d, 8)
#define ALL128(d) ALL96(d), SIXTEEN(d, 12)
#define ALL192(d) ALL128(d), SIXTEEN(d, 16), SIXTEEN(d, 20)
#define ALL256(d) ALL192(d), SIXTEEN(d, 24), SIXTEEN(d, 28)
#define NAMES32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES64 \
    NAMES32 "," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES96 NAMES64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES128 NAMES96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES192 \
    NAMES128 "," \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES256 \
    NAMES192 "," \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
    "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// c (+)= a b^T of two tiles in shared memory, columns inside; `more` 0 begins a sum.
#define MULTIPLY(N, A, B, MORE) \
    __device__ __forceinline__ void multiply(float (&c)[N / 8][4], u64 a, u64 b, int more) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" MORE ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES##N "}, %" A ", %" B ", p, 1, 1, 0, 0;\n}" \
                     : ALL##N(c) : "l"(a), "l"(b), "r"(more)); \
    }
MULTIPLY(32, "16", "17", "18")
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
MULTIPLY_ADD(192, "96", "97", "98", "99", "100")
MULTIPLY_ADD(256, "128", "129", "130", "131", "132")

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

// c = 64 rows of `own`, of so many, times those of `other`, over so many columns.
template <int OF, int COLUMNS = DIM, int N>
__device__ __forceinline__ void scores(float (&c)[N][4], u32 own, u32 other) {
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) multiply(c, along<OF>(own, k), along<N * 8>(other, k), k);
    end();
}

// c += p times rows of `other`.
template <int K, int N>
__device__ __forceinline__ void add(float (&c)[N][4], const Left<K>& p, u32 other) {
#pragma unroll
    for (int k = 0; k < K; k++) multiply_add(c, p.a[k], across<K * 16>(other, k));
    end();
}

// Pieces that blocks have taken beyond their first ones, of each kernel; none while no kernel runs. Pieces come longest first, and
// whoever is free takes one: which block computes a piece changes nothing in it.
__device__ int taken[3];

// Asks for a piece, long before it is needed: the answer takes a while.
__device__ __forceinline__ int take_piece(int& taken) { return atomicAdd(&taken, 1); }

// The piece that was asked for. A block asks once for each piece that it has, so that all together ask as often as there are pieces.
__device__ __forceinline__ int piece_taken(int& taken, int answer, int pieces) {
    if (answer == pieces - 1) taken = 0;
    return gridDim.x + answer;
}

// The assembler moves a wait for products up, over arithmetic that stands before it in the same basic block, and then nothing is left
// to do while they are computed. The loop around the test of a barrier, which is open already, ends the block.
__device__ __forceinline__ void stay(u64* open, u32 parity) { wait_for(open, parity); }

// A number that all lanes of a warp have alike, so that the assembler knows it: what follows from it then lies in uniform registers,
// from which wgmma takes the addresses of its tiles.
__device__ __forceinline__ int alike(int x) { return __shfl_sync(0xffffffffu, x, 0); }

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

// A piece of work, as the loading warp tells it to the others: a tile of rows, a head, and of queries where their answers begin.
struct Piece {
    Tile t;
    int head;  // -1 behind the last piece
    int starts[ROWS];
};

// What of a tile that passes by a warp group sees.
enum Sight { NONE, PART, WHOLE };

// What 64 queries see of some keys. Queries behind the example do not count: their rows are not stored, or have no weight.
__device__ __forceinline__ Sight sight_of(const Tile& t, Begins b, int query, int key, int keys, int window) {
    if (none_visible(t, b, query, 64, key, keys, window)) return NONE;
    return all_visible(t, b, query, min(64, t.length - query), key, keys, window) ? WHOLE : PART;
}

// A tile that passes by, as the loading warp tells it to a warp group.
struct Passing {
    int word;

    __device__ __forceinline__ Passing(int first, bool last, Sight sight) : word(first << 3 | last << 2 | sight) {}

    // A tile of keys, as a warp group's 64 queries of a piece see it.
    __device__ __forceinline__ Passing(const Piece& piece, int group, int key, int keys, bool last, int window)
        : Passing(key, last, sight_of(piece.t, {piece.starts[group * 64], piece.starts[group * 64 + 63]},
                                      piece.t.first + group * 64, key, keys, window)) {}

    __device__ __forceinline__ explicit Passing(int told) : word(told) {}
    __device__ __forceinline__ int first() const { return word >> 3; }
    __device__ __forceinline__ bool last() const { return word & 4; }
    __device__ __forceinline__ Sight sight() const { return Sight(word & 3); }
};

// Scores of keys that a query does not see become nothing. `own` is the first of a thread's two rows, `column` the tile's first column;
// ROWS_ARE_QUERIES says which of them are queries. `begin(n, i)` is where the answer of a number's query begins.
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
                p[n][i] = exp2_fast(p[n][i] * scale - shift[i / 2]);
                sum[i / 2] += p[n][i];
            }
    }
};

// Waits for the next tile of which a warp group sees something, or the last one. Where it lets others pass, the place of the tile before
// goes back first: the ones to come may need it.
template <int N>
__device__ __forceinline__ Passing next_tile(u64* full, u64* empty, const int (&told)[N][2], Turn& turn, int group, int& before) {
    while (true) {
        wait_for(full + turn.stage, turn.parity);
        Passing tile(alike(told[turn.stage][group]));
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
// of keys are computed during the softmax.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    attention(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
              const Tile* tiles, const int* begins, View out, float* lse, const bf16* sinks, int count, Shape s) {
    __shared__ u64 q_full[Q_PLACES], q_empty[Q_PLACES], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    __shared__ Piece told_pieces[Q_PLACES];
    __shared__ int told[STAGES][2];
    u32 qs = swizzled_memory(), ks = qs + Q_PLACES * BYTES(ROWS), vs = ks + STAGES * BYTES(KEYS);
    if (threadIdx.x == 0) {
        make_barriers(q_full, 1 + 32);
        make_barriers(q_empty, 8);
        make_barriers(k_full, 1);
        make_barriers(k_empty, 8);
        make_barriers(v_full, 1);
        make_barriers(v_empty, 8);
    }
    barriers_made();
    int lane = threadIdx.x % 32;
    Turn turn, own;
    if (threadIdx.x < 128) {
        give_registers<24>();
        if (threadIdx.x >= 32) return;
        int pieces = count * s.heads, index = blockIdx.x;
        while (true) {
            bool end = index >= pieces;
            Tile t = tiles[end ? 0 : index / s.heads];
            int h = index % s.heads, last = min(t.first + ROWS, t.length);
            Piece& piece = told_pieces[own.stage];
            wait_for(q_empty + own.stage, own.parity ^ 1);
            for (int i = lane; i < ROWS; i += 32) piece.starts[i] = begin_of(begins, t, t.first + i);
            if (lane == 0) {
                piece.t = t;
                piece.head = end ? -1 : h;
                expect(q_full + own.stage, end ? 0 : BYTES(ROWS));
                if (!end) bring<ROWS>(qs + own.stage * BYTES(ROWS), q, h, t.start + t.first - s.cached, q_full + own.stage);
            }
            arrive(q_full + own.stage);
            if (end) return;
            own.advance(Q_PLACES);
            __syncwarp();
            if (lane == 0) {
                int answer = take_piece(taken[0]);
                auto next = [&](int key) {
                    while (key < last && none_visible(t, begins_of(piece.starts), t.first, ROWS, key, KEYS, s.window)) key += KEYS;
                    return key;
                };
                for (int key = next(0), after; key < last; key = after) {
                    after = next(key + KEYS);
                    Passing tile[2] = {{piece, 0, key, KEYS, after >= last, s.window}, {piece, 1, key, KEYS, after >= last, s.window}};
                    wait_for(k_empty + turn.stage, turn.parity ^ 1);
                    for (int i = 0; i < 2; i++) told[turn.stage][i] = tile[i].word;
                    expect(k_full + turn.stage, BYTES(KEYS));
                    bring<KEYS>(ks + turn.stage * BYTES(KEYS), k, h / s.share, t.start + key, k_full + turn.stage);
                    wait_for(v_empty + turn.stage, turn.parity ^ 1);
                    expect(v_full + turn.stage, VALUE_BYTES(KEYS));
                    bring<KEYS, VALUE_DIM>(vs + turn.stage * VALUE_BYTES(KEYS), v, h / s.share, t.start + key, v_full + turn.stage);
                    turn.advance(STAGES);
                }
                index = piece_taken(taken[0], answer, pieces);
            }
            index = alike(index);
        }
    }
    take_registers<240>();
    int group = alike(threadIdx.x / 128) - 1, mine = group * 64 + threadIdx.x % 128 / 32 * 16;
    qs += group * 64 * 128;
    float scale = s.scale * LOG2E;
    while (true) {
        wait_for(q_full + own.stage, own.parity);
        const Piece& piece = told_pieces[own.stage];
        if (alike(piece.head) < 0) return;
        u32 queries = qs + own.stage * BYTES(ROWS);
        float o[WIDTH(VALUE_DIM) / 8][4] = {}, p[KEYS / 8][4], shrink[2];
        RowSoftmax softmax;
        auto weigh = [&](Passing tile) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) bend(p[n][i], s);
            if (tile.sight() != WHOLE) {
                int row = mine + lane / 4, starts[2] = {piece.starts[row], piece.starts[row + 8]};
                hide<true>(p, piece.t, piece.t.first + row, tile.first(), s.window, [&](int, int i) { return starts[i / 2]; });
            }
            softmax.step(p, shrink, scale);
        };
        wait_for(k_full + turn.stage, turn.parity);
        Passing tile(alike(told[turn.stage][group]));
        begin();
        scores<ROWS>(p, queries, ks + turn.stage * BYTES(KEYS));
        done<0>(p);
        release(k_empty + turn.stage);
        weigh(tile);
        while (!tile.last()) {
            Left<KEYS / 16> weights = as_left(p);
            Turn now = turn;
            turn.advance(STAGES);
            wait_for(k_full + turn.stage, turn.parity);
            tile = Passing(alike(told[turn.stage][group]));
            begin();
            scores<ROWS>(p, queries, ks + turn.stage * BYTES(KEYS));
            wait_for(v_full + now.stage, now.parity);
            begin();
            add(o, weights, vs + now.stage * VALUE_BYTES(KEYS));
            done<1>(p);
            release(k_empty + turn.stage);
            weigh(tile);
            stay(v_full + now.stage, now.parity);
            done<0>(o);
            release(v_empty + now.stage);
#pragma unroll
            for (int n = 0; n < WIDTH(VALUE_DIM) / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[n][i] *= shrink[i / 2];
        }
        Left<KEYS / 16> weights = as_left(p);
        wait_for(v_full + turn.stage, turn.parity);
        begin();
        add(o, weights, vs + turn.stage * VALUE_BYTES(KEYS));
        done<0>(o);
        release(v_empty + turn.stage);
        turn.advance(STAGES);
        Tile t = piece.t;
        int h = piece.head;
        release(q_empty + own.stage);
        own.advance(Q_PLACES);
        float by[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = softmax.sum[r];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            Total total(softmax.max[r] * s.scale, sum, sinks, h);
            by[r] = total.by;
            int row = t.first + mine + lane / 4 + r * 8;
            if (lane % 4 == 0 && row < t.length) lse[(long long)h * s.tokens + t.start + row] = total.log_sum;
        }
        store<VALUE_DIM>(value_head(out, h), t, t.first + mine, 0, o, by[0], by[1]);
    }
}
