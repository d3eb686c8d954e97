// prefill on Hopper: products by wgmma, rows by the tensor copy engine.
//
// A CTA takes 128 query rows of one head: two warpgroups of 64 rows each multiply, a third copies. A step is 128
// keys: two tiles of the list, or 128 gathered columns. Tiles of a view without pages, and tiles that lie in one
// page each, come by tensor copies; columns and all other tiles by cp.async of the copying warpgroup, row by row.
// Keys and values have their own stages, each with a barrier for "it is there" and one for "it is free". A warpgroup
// gives the tensor cores the scores of the next step and the weighted values of this one together, and the softmax of
// the next runs while the latter, and the other warpgroup's products, are summed.
#pragma once
#include "hopper.cuh"
#include "prefill.cuh"

#ifdef HAS_WGMMA

struct WideParams {
    TensorMap q, k, v; // [1][q_heads][rows][D]; [pages][kv_heads][tokens of a page][D], k and v only if `tensors`
    PrefillParams base;
    u32 section; // query heads whose row blocks are worked through together
    u32 tensors; // tensor copies serve the view
};

constexpr u32 STEP = 2 * TILE, WIDE_THREADS = 384, COPIERS = 128, PANEL = STEP * 128, Q_PANEL = HALF_ROWS * 128;
constexpr u32 COPIER_REGISTERS = 40, ATTENDER_REGISTERS = 232; // of a thread; together no more than 384 had at first
constexpr int ABSENT = 1 << 30;            // no tile: past every key
constexpr u64 NOWHERE = ~0ull;
constexpr int GATHERED = int(0x80000000u); // the step's keys are columns
constexpr u32 COPYING = 1;                  // the copiers' named barrier
// Who arrives at a stage's barriers: one thread for its warp, or for all copiers, once a barrier of these is passed. Racecheck
// follows a barrier from who arrives to who waits and no further, and so takes the others' reads and writes of `keys` and
// `first` for hazards. With DIRECT all of them arrive themselves; everything else is the same, and it finds nothing.
#ifdef DIRECT
constexpr u32 COPIERS_ARRIVE = COPIERS, ATTENDERS_ARRIVE = 2 * 128;
#else
constexpr u32 COPIERS_ARRIVE = 1, ATTENDERS_ARRIVE = 2 * 4;
#endif

template <u32 D, u32 STAGES>
struct WideShared {
    static constexpr u32 PLANE = STEP * D * 2, Q_BYTES = ROWS * D * 2;
    u32 base; // of q, then STAGES of keys, then STAGES of values; 1024-aligned
    u32 barriers;
    int (*keys)[STEP]; // [STAGES]: positions of gathered keys
    int (*first)[2];   // [STAGES]: of the step's tiles

    __device__ __forceinline__ u32 k(u32 stage) const { return base + Q_BYTES + stage * PLANE; }
    __device__ __forceinline__ u32 v(u32 stage) const { return base + Q_BYTES + (STAGES + stage) * PLANE; }
    __device__ __forceinline__ u32 q_there() const { return barriers; }
    __device__ __forceinline__ u32 k_there(u32 stage) const { return barriers + 8 * (1 + stage); }
    __device__ __forceinline__ u32 v_there(u32 stage) const { return barriers + 8 * (1 + STAGES + stage); }
    __device__ __forceinline__ u32 k_free(u32 stage) const { return barriers + 8 * (1 + 2 * STAGES + stage); }
    __device__ __forceinline__ u32 v_free(u32 stage) const { return barriers + 8 * (1 + 3 * STAGES + stage); }
};

// A CTA's part of the work.
struct Task {
    const Sequence& sequence;
    u32 head, kv_head, block; // the block of the sequence's
    u32 end; // position after the block's last row
    List list;
    const u32* numbers;
    u32 tile_count, tile_steps, column_count, steps;

    // Within a section of heads the longest row blocks come first, the heads of a group side by side.
    __device__ __forceinline__ static Task of(const WideParams& params) {
        const PrefillParams& base = params.base;
        const u32 section = blockIdx.x / (params.section * base.blocks), first = section * params.section;
        const u32 heads = min(params.section, base.q_heads - first);
        const u32 place = blockIdx.x - first * base.blocks, block = base.blocks - 1 - place / heads;
        return Task(base, sequence_of(base, block), block, first + place % heads);
    }

    __device__ __forceinline__ Task(const PrefillParams& base, const Sequence& sequence, u32 place, u32 head)
        : sequence(sequence), head(head) {
        block = place - sequence.first_block;
        kv_head = head / base.heads_per_kv;
        const HeadLists lists = reinterpret_cast<const HeadLists*>(base.heads)[head];
        list = reinterpret_cast<const List*>(base.lists)[lists.first + (sequence.first_list + block) * lists.step];
        numbers = reinterpret_cast<const u32*>(base.numbers);
        end = sequence.offset + (block + 1) * ROWS;
        tile_count = tiles_below(numbers, list, end);
        column_count = columns_below(numbers, list, end);
        tile_steps = (tile_count + 1) / 2;
        steps = tile_steps + (column_count + STEP - 1) / STEP;
    }

    __device__ __forceinline__ int first(u32 step, u32 half) const {
        const u32 index = 2 * step + half;
        return index < tile_count ? tile_first(numbers, list, end, index) : ABSENT;
    }
};

template <u32 D, u32 STAGES>
struct Copier {
    using Shared = WideShared<D, STAGES>;
    const WideParams& params;
    const Task& task;
    const Shared& shared;

    __device__ __forceinline__ static void wait_free(u32 barrier, u32 step) {
        if (step >= STAGES) barrier_wait(barrier, (step / STAGES - 1) & 1u);
    }

    // In pages: whether the tile lies in one and is full, or is not there at all.
    __device__ __forceinline__ bool tensor_serves(int first) const {
        const int tokens = int(task.sequence.tokens);
        if (first <= -int(TILE) || first >= tokens) return true;
        return first >= 0 && first % int(TILE) == 0 && first + int(TILE) <= tokens;
    }

    __device__ __forceinline__ bool tensors_serve(u32 step) const {
        return params.tensors && step < task.tile_steps && tensor_serves(task.first(step, 0)) &&
               tensor_serves(task.first(step, 1));
    }

    __device__ __forceinline__ void tensors(const TensorMap& map, u32 to, u32 barrier, const int (&first)[2]) const {
        const View& view = params.base.view;
        const u64 pages = task.sequence.pages;
        if constexpr (COPIERS_ARRIVE > 1) barrier_arrive(barrier, COPIERS_ARRIVE - 1);
        barrier_expect(barrier, Shared::PLANE);
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            int row = first[half];
            u32 page = 0;
            if (pages != 0 && row >= 0 && row < int(task.sequence.tokens)) {
                page = u32(row) / view.page_tokens;
                row -= int(page * view.page_tokens);
                page = __ldg(reinterpret_cast<const u32*>(pages) + page);
            } else if (pages != 0) {
                row = -int(TILE);
            }
#pragma unroll
            for (u32 panel = 0; panel < D / 64; ++panel)
                copy_tensor(to + panel * PANEL + half * TILE * 128, map, barrier, panel * 64, row, task.kv_head, page);
        }
    }

    // One thread copies a step's keys, or its values.
    __device__ __forceinline__ void tile_step(u32 step, bool keys) const {
        const u32 stage = step % STAGES;
        const int first[2] = {task.first(step, 0), task.first(step, 1)};
        if (keys) {
            wait_free(shared.k_free(stage), step);
            shared.first[stage][0] = first[0];
            shared.first[stage][1] = first[1];
            tensors(params.k, shared.k(stage), shared.k_there(stage), first);
        } else {
            wait_free(shared.v_free(stage), step);
            tensors(params.v, shared.v(stage), shared.v_there(stage), first);
        }
    }

    // Where the row lies that this thread finds for its warp, in bytes from the first key or value; NOWHERE if there is none.
    // For gathered columns and for tiles in pages.
    __device__ __forceinline__ u64 find_row(u32 step, u32 thread) const {
        int key;
        if (step >= task.tile_steps) {
            const u32 column = (step - task.tile_steps) * STEP + thread;
            key = column < task.column_count ? int(__ldg(task.numbers + task.list.columns + column)) : -1;
        } else {
            key = task.first(step, thread / TILE) + int(thread % TILE);
        }
        const bool there = key >= 0 && u32(key) < task.sequence.tokens;
        return there ? row_offset(params.base.view, task.sequence.pages, task.kv_head, u32(key)) : NOWHERE;
    }

    // All threads copy a step's keys, or its values, row by row: each warp the 32 rows that its threads have found.
    __device__ __forceinline__ void copy_rows(u64 base, u32 to, u64 found, u32 thread) const {
        constexpr u32 WORDS = D / 8, AT_ONCE = 32 / WORDS;
        const u32 lane = thread & 31u, word = lane % WORDS;
        to += (word >> 3) * PANEL;
#pragma unroll 4
        for (u32 i = 0; i < 32; i += AT_ONCE) {
            const u32 from_lane = i + lane / WORDS, row = (thread & ~31u) + from_lane;
            const u64 from = __shfl_sync(FULL_WARP, found, from_lane);
            const bool there = from != NOWHERE;
            copy_async(to + swizzle<128>(row, word & 7u),
                       reinterpret_cast<const void*>(base + (there ? from + word * 16 : 0)), there);
        }
    }

    // What all threads have copied but for the last `PENDING` rounds is there, and `barrier` says so, unless the copy
    // engine does.
    template <int PENDING>
    __device__ __forceinline__ static void say(u32 barrier, bool by_rows, u32 thread) {
        wait_copies<PENDING>();
        publish_shared();
        named_sync(COPYING, COPIERS);
        if (by_rows && thread < COPIERS_ARRIVE) barrier_arrive(barrier);
    }

    // Steps of which not all are tensor copies. Two rounds of copies are on their way at any time; a round is said to be
    // there once the next one was given.
    //
    // Who waits for a stage to be free: those that are about to write it, nobody else. A barrier tells one round from the
    // next by a single bit, so who looks late must not be able to miss two. Rows are copied by all threads, and the
    // round after theirs cannot end without them. A tensor copy needs the first thread alone: were the others to look as
    // well, that stage could be filled, read and free again before the slowest has looked, and it would wait forever. They
    // learn from the named barrier in `say`, which every step passes, that the first thread has seen the round.
    __device__ __forceinline__ void row_steps(u32 begin, u32 thread) const {
        const View& view = params.base.view;
        u64 found = NOWHERE;
        bool rows = false, rows_before = false; // of the step before this, and of the one before that
        for (u32 step = begin; step <= task.steps; ++step) {
            const u32 stage = step % STAGES, before = (step + STAGES - 1) % STAGES;
            const u32 earlier = (step + STAGES - 2) % STAGES;
            u64 next = NOWHERE;
            bool next_rows = false;
            if (step < task.steps) {
                next_rows = !tensors_serve(step);
                if (next_rows) {
                    next = find_row(step, thread);
                    wait_free(shared.k_free(stage), step);
                    const bool gathered = step >= task.tile_steps;
                    if (gathered)
                        shared.keys[stage][thread] = column_once(task.numbers, task.list, task.end, task.column_count,
                                                                 (step - task.tile_steps) * STEP + thread);
                    if (thread < 2) shared.first[stage][thread] = gathered ? GATHERED : task.first(step, thread);
                    copy_rows(view.k, shared.k(stage), next, thread);
                } else if (thread == 0) {
                    tile_step(step, true);
                }
                commit_copies();
                if (step > begin + 1) say<1>(shared.v_there(earlier), rows_before, thread);
            } else if (step > begin + 1) {
                say<0>(shared.v_there(earlier), rows_before, thread);
            }
            if (step > begin) {
                if (rows) {
                    wait_free(shared.v_free(before), step - 1);
                    copy_rows(view.v, shared.v(before), found, thread);
                } else if (thread == 0) {
                    tile_step(step - 1, false);
                }
                commit_copies();
                if (step == task.steps) say<0>(shared.v_there(before), rows, thread);
            } else if (begin > 0 && thread == 0) {
                tile_step(begin - 1, false);
            }
            if (step < task.steps) {
                if (step > begin)
                    say<1>(shared.k_there(stage), next_rows, thread);
                else
                    say<0>(shared.k_there(stage), next_rows, thread);
            }
            found = next;
            rows_before = rows;
            rows = next_rows;
        }
    }

    // Keys run one step ahead of values, as their readers do.
    __device__ __forceinline__ void run(u32 thread) const {
        const u32 tiled = params.tensors && task.sequence.pages == 0 ? task.tile_steps : 0;
        if (thread == 0) {
            const u32 row = task.sequence.first_row + task.block * ROWS;
            barrier_expect(shared.q_there(), Shared::Q_BYTES);
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
#pragma unroll
                for (u32 panel = 0; panel < D / 64; ++panel)
                    copy_tensor(shared.base + (half * (D / 64) + panel) * Q_PANEL, params.q, shared.q_there(), panel * 64,
                                int(row + half * HALF_ROWS), task.head, 0);
            }
            for (u32 step = 0; step < tiled; ++step) {
                tile_step(step, true);
                if (step > 0) tile_step(step - 1, false);
            }
            if (tiled > 0 && tiled == task.steps) tile_step(tiled - 1, false);
        }
        if (tiled == task.steps) return;
        // The first thread has waited for all that is older, so that nobody can mistake one round of a barrier for another.
        named_sync(COPYING, COPIERS);
        row_steps(tiled, thread);
    }
};

template <bool IS_BF16, u32 D, u32 STAGES>
struct Attender {
    using Shared = WideShared<D, STAGES>;
    const Shared& shared;
    float scale;
    u32 group;      // warpgroup, 0 or 1
    int group_first; // position of its first row

    // s = q k^T; in flight when this returns.
    __device__ __forceinline__ void scores(float (&s)[16][4], u32 stage) const {
        const u32 q = shared.base + group * (D / 64) * Q_PANEL, k = shared.k(stage);
#pragma unroll
        for (u32 i = 0; i < D / 16; ++i)
            wgmma_shared<IS_BF16>(s, wgmma_tile(q + (i / 4) * Q_PANEL + (i % 4) * 32, 16),
                                  wgmma_tile(k + (i / 4) * PANEL + (i % 4) * 32, 16), i > 0);
    }

    // o += p v; in flight when this returns.
    __device__ __forceinline__ void weigh(float (&o)[D / 8][4], const u32 (&p)[8][4], u32 stage) const {
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            wgmma<IS_BF16, true>(o, p[i], wgmma_tile(shared.v(stage) + i * 16 * 128, PANEL), true);
    }

    // Takes what each row does not see out of the scores; `row` is the position of the thread's first row.
    __device__ __forceinline__ void mask(float (&s)[16][4], u32 stage, int row) const {
        const int first[2] = {shared.first[stage][0], shared.first[stage][1]};
        const bool gathered = first[0] == GATHERED;
        const auto whole = [&](int first) { return first >= 0 && first + int(TILE) <= group_first + 1; };
        if (!gathered && whole(first[0]) && whole(first[1])) return;
        const u32 t = threadIdx.x & 3u;
#pragma unroll
        for (u32 n = 0; n < 16; ++n) {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 column = 8 * n + 2 * t + i;
                const int key = gathered ? shared.keys[stage][column] : first[n / 8] + int(column % TILE);
                if (key < 0 || key > row) s[n][i] = NEGATIVE_INFINITY;
                if (key < 0 || key > row + 8) s[n][i + 2] = NEGATIVE_INFINITY;
            }
        }
    }

    // Scores become weights relative to the new maxima; `shrink` is what earlier sums are worth then.
    __device__ __forceinline__ void soften(float (&s)[16][4], float (&m)[2], float (&l)[2], float (&shrink)[2]) const {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            float top = m[i];
#pragma unroll
            for (u32 n = 0; n < 16; ++n) top = fmaxf(top, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            const float shift = top == NEGATIVE_INFINITY ? 0.0f : top * scale;
            shrink[i] = exp2_fast(m[i] * scale - shift);
            m[i] = top;
            float sum[2] = {l[i] * shrink[i], 0.0f};
#pragma unroll
            for (u32 n = 0; n < 16; ++n) {
                s[n][2 * i] = exp2_fast(s[n][2 * i] * scale - shift);
                s[n][2 * i + 1] = exp2_fast(s[n][2 * i + 1] * scale - shift);
                sum[0] += s[n][2 * i];
                sum[1] += s[n][2 * i + 1];
            }
            l[i] = sum[0] + sum[1];
        }
    }

    __device__ __forceinline__ static void round(u32 (&p)[8][4], const float (&s)[16][4]) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            p[i][0] = pack<IS_BF16>(s[2 * i][0], s[2 * i][1]);
            p[i][1] = pack<IS_BF16>(s[2 * i][2], s[2 * i][3]);
            p[i][2] = pack<IS_BF16>(s[2 * i + 1][0], s[2 * i + 1][1]);
            p[i][3] = pack<IS_BF16>(s[2 * i + 1][2], s[2 * i + 1][3]);
        }
    }

    // This warp reads a stage no more.
    __device__ __forceinline__ static void free(u32 barrier) {
        __syncwarp();
        if (ATTENDERS_ARRIVE > 8 || (threadIdx.x & 31u) == 0) barrier_arrive(barrier);
    }

    __device__ __forceinline__ void run(const PrefillParams& params, const Task& task) const {
        const u32 warp = threadIdx.x / 32 % 4, g = (threadIdx.x & 31u) >> 2, t = threadIdx.x & 3u;
        // Rows g and g + 8 of the warp's 16.
        const u32 row = task.block * ROWS + group * HALF_ROWS + warp * 16 + g;
        const int position = int(task.sequence.offset + row);
        float o[D / 8][4], s[16][4], m[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, l[2] = {0.0f, 0.0f}, shrink[2];
        u32 p[8][4];
#pragma unroll
        for (u32 i = 0; i < D / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;

        const u32 steps = task.steps;
        if (steps > 0) {
            barrier_wait(shared.q_there(), 0);
            barrier_wait(shared.k_there(0), 0);
            wgmma_begin();
            scores(s, 0);
            wgmma_commit();
            wgmma_wait<0>();
            settle(s);
            mask(s, 0, position);
            free(shared.k_free(0));
            soften(s, m, l, shrink);
            round(p, s);

            u32 stage = 0, phase = 0; // of the values; their keys are one step further
            for (u32 step = 1; step < steps; ++step) {
                const bool wraps = stage + 1 == STAGES;
                const u32 next = wraps ? 0 : stage + 1, next_phase = phase ^ u32(wraps);
                barrier_wait(shared.k_there(next), next_phase);
                settle(s);
                settle(o);
                settle(p);
                wgmma_begin();
                scores(s, next);
                wgmma_commit();
                barrier_wait(shared.v_there(stage), phase);
                wgmma_begin();
                weigh(o, p, stage);
                wgmma_commit();
                wgmma_wait<1>();
                settle(s);
                mask(s, next, position);
                free(shared.k_free(next));
                soften(s, m, l, shrink);
                wgmma_wait<0>();
                settle(o);
                settle(p);
                free(shared.v_free(stage));
                // Maxima settle after a few steps, and then there is nothing to do here.
                if (__any_sync(FULL_WARP, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                    for (u32 n = 0; n < D / 8; ++n) {
                        o[n][0] *= shrink[0];
                        o[n][1] *= shrink[0];
                        o[n][2] *= shrink[1];
                        o[n][3] *= shrink[1];
                    }
                }
                round(p, s);
                stage = next;
                phase = next_phase;
            }
            barrier_wait(shared.v_there(stage), phase);
            settle(o);
            settle(p);
            wgmma_begin();
            weigh(o, p, stage);
            wgmma_commit();
            wgmma_wait<0>();
            settle(o);
        }

#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            l[i] += __shfl_xor_sync(FULL_WARP, l[i], 1);
            l[i] += __shfl_xor_sync(FULL_WARP, l[i], 2);
            if (row + 8 * i >= task.sequence.rows) continue;
            const u64 at = task.sequence.first_row + row + 8 * i;
            const float part = l[i] > 0.0f ? 1.0f / l[i] : 0.0f;
            u32* to = reinterpret_cast<u32*>(params.out) + (at * params.q_heads + task.head) * (D / 2) + t;
#pragma unroll
            for (u32 n = 0; n < D / 8; ++n) to[n * 4] = pack<IS_BF16>(o[n][2 * i] * part, o[n][2 * i + 1] * part);
            if (t == 0)
                reinterpret_cast<float*>(params.out_lse)[u64(task.head) * params.rows + at] =
                    log_sum(m[i] * params.scale, l[i]);
        }
    }
};

template <bool IS_BF16, u32 D, u32 STAGES>
__device__ __forceinline__ void prefill_wide(const WideParams& params) {
    extern __shared__ u8 dynamic[];
    __shared__ alignas(8) u64 barriers[1 + 4 * STAGES];
    __shared__ int keys[STAGES][STEP], first[STAGES][2];
    const WideShared<D, STAGES> shared{(shared_address(dynamic) + 1023u) & ~1023u, shared_address(barriers), keys, first};
    if (threadIdx.x == 0) {
        barrier_init(shared.q_there(), 1);
        for (u32 i = 0; i < STAGES; ++i) {
            barrier_init(shared.k_there(i), COPIERS_ARRIVE);
            barrier_init(shared.v_there(i), COPIERS_ARRIVE);
            barrier_init(shared.k_free(i), ATTENDERS_ARRIVE);
            barrier_init(shared.v_free(i), ATTENDERS_ARRIVE);
        }
        barrier_publish();
    }
    __syncthreads();
    const Task task = Task::of(params);
    const u32 group = __shfl_sync(FULL_WARP, threadIdx.x / COPIERS, 0);
    if (group == 0) {
        registers_give_back<COPIER_REGISTERS>();
        Copier<D, STAGES>{params, task, shared}.run(threadIdx.x);
    } else {
        registers_take<ATTENDER_REGISTERS>();
        const int group_first = int(task.sequence.offset + task.block * ROWS + (group - 1) * HALF_ROWS);
        Attender<IS_BF16, D, STAGES>{shared, params.base.scale, group - 1, group_first}.run(params.base, task);
    }
}

#endif
