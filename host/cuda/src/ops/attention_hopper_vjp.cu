// The backward pass of attention_hopper.cu: scores are computed again, once for dk and dv and once for dq, so that every sum is taken by
// one warp group in a fixed order. Where a warp group waits for products, the other one multiplies.

// dq. A piece is a head and a tile of ROWS queries; keys and values pass by.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    attention_dq(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                 const __grid_constant__ TensorMap dout, const Tile* tiles, const int* begins, const float* lse,
                 const float* delta, View dq, int count, Shape s) {
    __shared__ u64 q_full, q_empty, dout_full, dout_empty, full[STAGES], empty[STAGES];
    __shared__ Piece told_pieces[2];
    __shared__ int told[STAGES][2];
    u32 qs = swizzled_memory(), douts = qs + BYTES(ROWS), pairs = douts + VALUE_BYTES(ROWS);
    if (threadIdx.x == 0) {
        make_barrier(&q_full, 1 + 32);
        make_barrier(&q_empty, 8);
        make_barrier(&dout_full, 1);
        make_barrier(&dout_empty, 8);
        make_barriers(full, 1);
        make_barriers(empty, 8);
    }
    barriers_made();
    int lane = threadIdx.x % 32;
    Turn turn;
    u32 parity = 0;
    if (threadIdx.x < 128) {
        give_registers<24>();
        if (threadIdx.x >= 32) return;
        int pieces = count * s.heads, index = blockIdx.x;
        for (;; parity ^= 1) {
            bool end = index >= pieces;
            Tile t = tiles[end ? 0 : index / s.heads];
            int h = index % s.heads, last = min(t.first + ROWS, t.length), starts[ROWS / 32];
            for (int i = 0; i < ROWS / 32; i++) starts[i] = begin_of(begins, t, t.first + lane + i * 32);
            Piece& piece = told_pieces[parity];
            wait_for(&q_empty, parity ^ 1);
            for (int i = 0; i < ROWS / 32; i++) piece.starts[lane + i * 32] = starts[i];
            if (lane == 0) {
                piece.t = t;
                piece.head = end ? -1 : h;
                expect(&q_full, end ? 0 : BYTES(ROWS));
                if (!end) bring<ROWS>(qs, q, h, t.start + t.first, &q_full);
            }
            arrive(&q_full);
            if (end) return;
            __syncwarp();
            if (lane == 0) {
                int answer = take_piece(taken[1]);
                auto next = [&](int key) {
                    while (key < last && none_visible(t, begins_of(piece.starts), t.first, ROWS, key, DQ_KEYS, s.window)) key += DQ_KEYS;
                    return key;
                };
                int begin = next(0);
                for (int key = begin, after; key < last; key = after) {
                    after = next(key + DQ_KEYS);
                    Passing tile[2] = {{piece, 0, key, DQ_KEYS, after >= last, s.window},
                                       {piece, 1, key, DQ_KEYS, after >= last, s.window}};
                    wait_for(empty + turn.stage, turn.parity ^ 1);
                    for (int i = 0; i < 2; i++) told[turn.stage][i] = tile[i].word;
                    u32 to = pairs + turn.stage * PAIR_BYTES(DQ_KEYS);
                    expect(full + turn.stage, PAIR_BYTES(DQ_KEYS));
                    bring<DQ_KEYS>(to, k, h / s.share, t.start + key, full + turn.stage);
                    if (key == begin) {
                        wait_for(&dout_empty, parity ^ 1);
                        expect(&dout_full, VALUE_BYTES(ROWS));
                        bring<ROWS, VALUE_DIM>(douts, dout, h, t.start + t.first, &dout_full);
                    }
                    bring<DQ_KEYS, VALUE_DIM>(to + BYTES(DQ_KEYS), v, h / s.share, t.start + key, full + turn.stage);
                    turn.advance(STAGES);
                }
                index = piece_taken(taken[1], answer, pieces);
            }
            index = alike(index);
        }
    }
    take_registers<240>();
    int group = alike(threadIdx.x / 128) - 1, mine = group * 64 + threadIdx.x % 128 / 32 * 16;
    qs += group * 64 * 128;
    douts += group * 64 * 128;
    float scale = s.scale * LOG2E;
    for (;; parity ^= 1) {
        wait_for(&q_full, parity);
        const Piece& piece = told_pieces[parity];
        if (alike(piece.head) < 0) return;
        float logsum[2], pull[2], sums[WIDTH(DIM) / 8][4] = {}, p[DQ_KEYS / 8][4], dp[DQ_KEYS / 8][4];
        own_numbers(logsum, pull, lse, delta, piece.t, mine, piece.head, s);
        int before = -1;
        Passing tile = next_tile(full, empty, told, turn, group, before);
        begin();
        scores<ROWS>(p, qs, pairs + turn.stage * PAIR_BYTES(DQ_KEYS));
        done<0>(p);
        wait_for(&dout_full, parity);
        for (bool more = true; more;) {
            u32 at = pairs + turn.stage * PAIR_BYTES(DQ_KEYS);
            begin();
            scores<ROWS, VALUE_DIM>(dp, douts, at + BYTES(DQ_KEYS));
            more = !tile.last();
            if (!more) release(&q_empty);
#if SOFTCAP
            float slopes[DQ_KEYS / 8][4];
#pragma unroll
            for (int n = 0; n < DQ_KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) slopes[n][i] = bend(p[n][i], s);
#endif
            if (tile.sight() != WHOLE) {
                int row = mine + lane / 4, starts[2] = {piece.starts[row], piece.starts[row + 8]};
                hide<true>(p, piece.t, piece.t.first + row, tile.first(), s.window, [&](int, int i) { return starts[i / 2]; });
            }
#pragma unroll
            for (int n = 0; n < DQ_KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) p[n][i] = exp2_fast(p[n][i] * scale - logsum[i / 2]);
            done<0>(dp);
            if (!more) release(&dout_empty);
#pragma unroll
            for (int n = 0; n < DQ_KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    p[n][i] *= dp[n][i] - pull[i / 2];
#if SOFTCAP
                    p[n][i] *= slopes[n][i];
#endif
                }
            Left<DQ_KEYS / 16> left = as_left(p);
            begin();
            add(sums, left, at);
            before = turn.stage;
            turn.advance(STAGES);
            if (more) {
                tile = next_tile(full, empty, told, turn, group, before);
                begin();
                scores<ROWS>(p, qs, pairs + turn.stage * PAIR_BYTES(DQ_KEYS));
            }
            done<0>(p);
            done<0>(sums);
            if (before >= 0) release(empty + before);
        }
        store<DIM>(head(dq, piece.head), piece.t, piece.t.first + mine, 0, sums, s.scale, s.scale);
    }
}

// dk and dv. A piece is a tile of OWN_KEYS keys, a key head and one of `parts` runs of the query heads that share it; queries and the
// gradient of the output pass by. Every part has columns of its own in dk, [tokens, kv_heads * parts * DIM], and in dv. The length of a tile
// ends with the last query that sees one of its keys.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    attention_dkv(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                  const __grid_constant__ TensorMap dout, const Tile* tiles, const int* begins, const float* lse,
                  const float* delta, View dk, View dv, int count, int parts, Shape s) {
    __shared__ u64 k_full, k_empty, v_full, v_empty, full[PAIRS], empty[PAIRS];
    __shared__ Piece told_pieces[2];
    __shared__ int told[PAIRS][2], starts[PAIRS][STEP], following;
    u32 ks = swizzled_memory(), vs = ks + BYTES(OWN_KEYS), pairs = vs + VALUE_BYTES(OWN_KEYS);
    u32 numbers = pairs + PAIRS * PAIR_BYTES(STEP);  // [place][log-sum, delta][query]
    if (threadIdx.x == 0) {
        make_barrier(&k_full, 1);
        make_barrier(&k_empty, 8);
        make_barrier(&v_full, 1);
        make_barrier(&v_empty, WIDE_HEAD ? 4 : 8);
        make_barriers(full, 1 + 32);
        make_barriers(empty, 8);
    }
    barriers_made();
    int lane = threadIdx.x % 32;
    Turn turn;
    u32 parity = 0;
    if (threadIdx.x < 128) {
        give_registers<24>();
        // A warp for every place of the ring: what one has on its way, the others do not wait for.
        int columns = s.heads / s.share * parts, pieces = count * columns, index = blockIdx.x, warp = threadIdx.x / 32, step = 0;
        for (;; parity ^= 1) {
            bool end = index >= pieces;
            Tile t = tiles[end ? 0 : index / columns];
            int column = index % columns, kv = column / parts, part = column % parts;
            auto next = [&](int query) {
                if (s.window == 0) return query;
                while (query < t.length &&
                       none_visible(t, begins_of(begins, t, query, STEP), query, STEP, t.first, OWN_KEYS, s.window))
                    query += STEP;
                return query;
            };
            int answer = 0;
            if (threadIdx.x == 0) {
                wait_for(&k_empty, parity ^ 1);
                told_pieces[parity].t = t;
                told_pieces[parity].head = end ? -1 : column;
                expect(&k_full, end ? 0 : BYTES(OWN_KEYS));
                if (!end) {
                    bring<OWN_KEYS>(ks, k, kv, t.start + t.first, &k_full);
                    answer = take_piece(taken[2]);
                }
            }
            if (end) return;
            if (threadIdx.x == 32) {
                wait_for(&v_empty, parity ^ 1);
                expect(&v_full, VALUE_BYTES(OWN_KEYS));
                bring<OWN_KEYS, VALUE_DIM>(vs, v, kv, t.start + t.first, &v_full);
            }
            __syncwarp();
            int h = kv * s.share + s.share * part / parts, last = kv * s.share + s.share * (part + 1) / parts - 1;
            for (; h <= last; h++)
                for (int query = next(t.first), after; query < t.length; query = after) {
                    after = next(query + STEP);
                    if (step++ % PAIRS != warp) continue;
                    wait_for(empty + warp, turn.parity ^ 1);
                    turn.parity ^= 1;
                    if (lane == 0) {
                        u32 to = pairs + warp * PAIR_BYTES(STEP);
                        expect(full + warp, PAIR_BYTES(STEP));
                        bring<STEP>(to, q, h, t.start + query, full + warp);
                        bring<STEP, VALUE_DIM>(to + BYTES(STEP), dout, h, t.start + query, full + warp);
                    }
                    float* to = (float*)__cvta_shared_to_generic(numbers) + warp * 2 * STEP;
                    for (int i = lane; i < STEP; i += 32) {
                        // Queries behind the last that sees a key have no weight.
                        bool inside = query + i < t.length;
                        long long place = (long long)h * s.tokens + t.start + query + i;
                        to[i] = inside ? lse[place] * LOG2E : 1e30f;
                        to[STEP + i] = inside ? delta[place] : 0.f;
                        starts[warp][i] = begin_of(begins, t, query + i);
                    }
                    __syncwarp();
                    if (lane < 2) {
                        Sight sight = sight_of(t, begins_of(starts[warp]), query, t.first + lane * (OWN_KEYS - 64), 64, s.window);
                        told[warp][lane] = Passing(query, after >= t.length && h == last, sight).word;
                    }
                    arrive(full + warp);
                }
            // All warps read what follows before it changes.
            if (threadIdx.x == 0) following = piece_taken(taken[2], answer, pieces);
            asm volatile("bar.sync 1, 128;" ::: "memory");
            index = following;
            asm volatile("bar.sync 1, 128;" ::: "memory");
        }
    }
#if WIDE_HEAD
    take_registers<240>();
    // One warp group has the weights and dv, the other has their gradient and dk, for the same keys: both sums do not fit into the
    // registers of one. A thread gives its weights to the one at the same place of the other group: barrier 2 says that they are
    // there, barrier 3 that they have been read.
    u32 exchange = numbers + PAIRS * 2 * STEP * 4 + threadIdx.x % 128 * 16;
    int group = alike(threadIdx.x / 128) - 1, mine = threadIdx.x % 128 / 32 * 16;
    u32 own = group ? vs : ks;
    numbers += lane % 4 * 8;
    float scale = s.scale * LOG2E, p[STEP / 8][4];
    // Keys with queries, values with the gradient of the output.
    auto begin_scores = [&] {
        u32 at = pairs + turn.stage * PAIR_BYTES(STEP);
        if (DIM == VALUE_DIM || !group) {
            begin();
            scores<OWN_KEYS>(p, own, at + group * BYTES(STEP));
        } else {
            begin();
            scores<OWN_KEYS, VALUE_DIM>(p, own, at + BYTES(STEP));
        }
    };
    if (group) asm volatile("bar.arrive 3, 256;" ::: "memory");
    for (;; parity ^= 1) {
        wait_for(&k_full, parity);
        const Piece& piece = told_pieces[parity];
        if (alike(piece.head) < 0) return;
        if (group) wait_for(&v_full, parity);
        // Of dv behind its own columns what nobody stores.
        float sums[WIDTH(DIM) / 8][4] = {};
        int before = -1;
        Passing tile = next_tile(full, empty, told, turn, group, before);
        begin_scores();
        done<0>(p);
        for (bool more = true; more;) {
            u32 at = pairs + turn.stage * PAIR_BYTES(STEP) + (1 - group) * BYTES(STEP), of = numbers + turn.stage * 8 * STEP;
            more = !tile.last();
            if (!more) release(&k_empty);
            if (!more && group) release(&v_empty);
            Left<STEP / 16> left;
            if (group == 0) {
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
                    for (int i = 0; i < 4; i++) p[n][i] = exp2_fast(p[n][i] * scale - (i % 2 ? logsum.y : logsum.x));
                }
                left = as_left(p);
                asm volatile("bar.sync 3, 256;" ::: "memory");
#pragma unroll
                for (int n = 0; n < STEP / 8; n++) {
#if SOFTCAP
#pragma unroll
                    for (int i = 0; i < 4; i++) p[n][i] *= slopes[n][i];
#endif
                    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(exchange + n * 2048), "f"(p[n][0]), "f"(p[n][1]),
                                 "f"(p[n][2]), "f"(p[n][3]) : "memory");
                }
                asm volatile("bar.arrive 2, 256;" ::: "memory");
            } else {
                asm volatile("bar.sync 2, 256;" ::: "memory");
#pragma unroll
                for (int n = 0; n < STEP / 8; n++) {
                    float2 pull = pair_at(of + STEP * 4 + n * 32);
                    float weights[4];
                    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(weights[0]), "=f"(weights[1]), "=f"(weights[2]),
                                 "=f"(weights[3]) : "r"(exchange + n * 2048) : "memory");
#pragma unroll
                    for (int i = 0; i < 4; i++) p[n][i] = weights[i] * (p[n][i] - (i % 2 ? pull.y : pull.x));
                }
                asm volatile("bar.arrive 3, 256;" ::: "memory");
                left = as_left(p);
            }
            begin();
            add(sums, left, at);
            before = turn.stage;
            turn.advance(PAIRS);
            if (more) {
                tile = next_tile(full, empty, told, turn, group, before);
                begin_scores();
            }
            done<0>(p);
            done<0>(sums);
            if (before >= 0) release(empty + before);
        }
        int row = piece.t.first + mine;
        if (group) store<DIM>(head(dk, piece.head), piece.t, row, 0, sums, s.scale, s.scale);
        else store<VALUE_DIM>(value_head(dv, piece.head), piece.t, row, 0, sums, 1.f, 1.f);
    }
#else
    take_registers<240>();
    int group = alike(threadIdx.x / 128) - 1, mine = group * 64 + threadIdx.x % 128 / 32 * 16;
    ks += group * 64 * 128;
    vs += group * 64 * 128;
    numbers += lane % 4 * 8;
    float scale = s.scale * LOG2E;
    for (;; parity ^= 1) {
        wait_for(&k_full, parity);
        const Piece& piece = told_pieces[parity];
        if (alike(piece.head) < 0) return;
        float dks[WIDTH(DIM) / 8][4] = {}, dvs[WIDTH(VALUE_DIM) / 8][4] = {}, p[STEP / 8][4], dp[STEP / 8][4];
        int before = -1;
        Passing tile = next_tile(full, empty, told, turn, group, before);
        begin();
        scores<OWN_KEYS>(p, ks, pairs + turn.stage * PAIR_BYTES(STEP));
        done<0>(p);
        wait_for(&v_full, parity);
        for (bool more = true; more;) {
            u32 at = pairs + turn.stage * PAIR_BYTES(STEP), of = numbers + turn.stage * 8 * STEP;
            begin();
            scores<OWN_KEYS, VALUE_DIM>(dp, vs, at + BYTES(STEP));
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
                for (int i = 0; i < 4; i++) p[n][i] = exp2_fast(p[n][i] * scale - (i % 2 ? logsum.y : logsum.x));
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
                scores<OWN_KEYS>(p, ks, pairs + turn.stage * PAIR_BYTES(STEP));
            }
            done<0>(p);
            done<0>(dvs);
            done<0>(dks);
            if (before >= 0) release(empty + before);
        }
        Tile t = piece.t;
        int column = piece.head;
        store<DIM>(head(dk, column), t, t.first + mine, 0, dks, s.scale, s.scale);
        store<VALUE_DIM>(value_head(dv, column), t, t.first + mine, 0, dvs, 1.f, 1.f);
    }
#endif
}
