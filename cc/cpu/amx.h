// The two products of attention, by tiles of bfloat16 (Intel AMX).
//
// A tile product is C[m][n] += sum_k A[m][k] B[k][n], with A of up to 16 rows of 32 elements, and B
// of 16 rows of up to 16 pairs. Keys are A as they lie in memory, queries B as packed for vectors
// that do not repeat; weights are A, 16 steps of a row side by side, values B as packed for
// vectors. Panels of fewer than 16 rows make narrow tiles: fewer columns of scores, fewer rows of
// weighted values.

#ifndef JAX_NSA_CPU_AMX_H_
#define JAX_NSA_CPU_AMX_H_

#include <cstdint>

#include "cpu/ahead.h"
#include "cpu/operands.h"
#include "cpu/rows.h"
#include "cpu/scores.h"
#include "cpu/values.h"
#if defined(JAX_NSA_EMULATED_AMX)
#include "emulated_amx_instructions.h"
#else
#include "cpu/amx_instructions.h"
#endif

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileWords = 16;  // of 4 bytes, in a row of a tile

// Registers. Narrow panels have two for scores and two for sums; of others, all are alike, and both
// products sum into four.
constexpr int kScores[] = {0, 1, 5, 6};  // 16 keys by rows
constexpr int kQueries[] = {2, 4};       // 16 words by rows
constexpr int kFull = 3;                 // keys, or values: 16 by 16 words
constexpr int kWeights[] = {4, 2};       // rows by 16 steps
constexpr int kSums[] = {5, 6, 0, 1};    // rows by 16 columns

// Makes the tile registers usable while it lives.
class TileScope {
 public:
  explicit TileScope(int64_t padded_rows) {
    const int64_t rows = padded_rows < kTileRows ? padded_rows : kTileRows;
    TileConfiguration configuration;
    for (int tile : {0, 1, 2}) configuration.Set(tile, kTileRows, rows);
    configuration.Set(kFull, kTileRows, kTileWords);
    for (int tile : {4, 5, 6}) configuration.Set(tile, rows, kTileWords);
    ConfigureTiles(configuration);
  }
  ~TileScope() { ReleaseTiles(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

class AmxTiles {
 public:
  using Key = Operands<BFloat16, 2>;
  using Words = ValueWords<BFloat16, FloatProducts>;  // of sums: even columns, then odd ones
  using Ahead = AheadByTime;
  using Scope = TileScope;
  static constexpr bool kHeadsTogether = false;  // scores of one stay in the caches
  static constexpr bool kPairs = true;
  static constexpr int64_t kStepGranule = kTileRows;
  static constexpr int64_t kSteps = kMostSteps;  // weighed at once: fewer loads and stores of sums

  static int64_t Repeat(int64_t) { return 1; }
  static bool ReadsInPlace(int64_t, int64_t head_size) { return head_size % (2 * kTileWords) == 0; }

  // In the time that the work on a tile takes.
  static Ahead FetchAhead(const TileRows&, const TileRows& next, const Rows& queries,
                          const TileWork& work) {
    const int64_t vectors = work.positions * work.padded_rows / kLanes;
    const int64_t block_vectors = work.blocks * RoundUp(work.padded_rows, kLanes) / kLanes;
    const int64_t value_steps = work.positions / 2;
    const int64_t scores = work.positions / kTileRows * (work.key_words / kTileWords) *
                           RowTiles(work.padded_rows) * kScoreSteps;
    const int64_t weigh = RowTiles(work.rows) * (PaddedWords(work.value_size) / kTileWords) *
                          (RoundUp(value_steps, kTileRows) / kTileRows) * kWeighSteps;
    const int64_t steps = scores + vectors + kBlockSteps * block_vectors + vectors / 2 +
                          value_steps * PackSteps(work.value_size) + weigh;
    return Ahead(next.keys, next.values, queries, work.heads * steps);
  }

  static constexpr int64_t kAtOnce = kMaxPage;  // positions

  // As Vectors::Score, of any number of keys, of one head.
  template <bool in_place>
  static void Score(const HeadRows& keys, const Queries& queries, float* scores, Ahead& ahead) {
    if (queries.rows > kTileWords) return ScoreAll<2, 2>(keys, queries, scores, ahead);
    if (queries.rows == kTileWords) return ScoreAll<4, 1>(keys, queries, scores, ahead);
    ScoreAll<2, 1>(keys, queries, scores, ahead);
  }

  // As Vectors::Weigh, of one head, but for the order of weights: the steps of a tile
  // lie side by side, [step / kStepGranule][padded row][step % kStepGranule], zeros up to a whole
  // tile. Sums must hold all padded rows. `packed` has room for kSteps steps of values.
  template <class Head>
  static void Weigh(Head head, int64_t, int64_t size, int64_t padded_rows, int64_t rows,
                    uint32_t* packed, Ahead& ahead) {
    const auto [values, weights, sums] = head(0);
    const int64_t columns = PaddedWords(size), steps = RoundUp(values.count, 2) / 2;
    for (int64_t s = 0; s < steps; s += kSteps) {
      const int64_t count = Least(kSteps, steps - s);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = 2 * (s + i);
        const char* const row = values.first + position * values.stride;
        const char* const next = position + 1 < values.count ? row + values.stride : nullptr;
        Key::PackStep(row, next, size, packed + i * columns);
        ahead.Step(PackSteps(size));
      }
      const int64_t whole = RoundUp(count, kStepGranule);
      for (int64_t i = count * columns; i < whole * columns; ++i) packed[i] = 0;
      WeighAll({weights + s * padded_rows, padded_rows, packed, columns, count}, rows, sums, ahead);
    }
  }

 private:
  // Weights of some steps, and the values to be weighed, [step][columns].
  struct Weighing {
    const uint32_t* weights;
    int64_t stride;
    const uint32_t* values;
    int64_t columns;
    int64_t steps;
  };

  // Steps of Ahead, in the time of Operands::PackStep.
  static int64_t PackSteps(int64_t size) { return PaddedWords(size) / (4 * kLanes) + 1; }

  static void WeighAll(const Weighing& weighing, int64_t rows, float* sums, Ahead& ahead) {
    // All rows meet the same values in turn. There is an even number of tiles of columns.
    int64_t c = 0;
    if (rows <= kTileRows && weighing.stride >= kTileRows) {
      for (; c + 4 * kTileWords <= weighing.columns; c += 4 * kTileWords) {
        WeighTiles<1, 4>(weighing, 0, c, sums, ahead);
      }
    }
    for (; c < weighing.columns; c += 2 * kTileWords) {
      int64_t r = 0;
      for (; r + kTileRows < rows; r += 2 * kTileRows) {
        WeighTiles<2, 2>(weighing, r, c, sums, ahead);
      }
      if (r < rows) WeighTiles<1, 2>(weighing, r, c, sums, ahead);
    }
  }

  // Of Ahead, in the time of a product and the loads, stores and transposing that belong to it.
  static constexpr int64_t kScoreSteps = 4, kWeighSteps = 8;

  static int64_t RowTiles(int64_t rows) { return (rows + kTileWords - 1) / kTileWords; }

  // Calls the function with the numbers below `count` as constants.
  template <int count, class Function>
  static inline void ForEach(Function function) {
    if constexpr (count > 0) {
      ForEach<count - 1>(function);
      function(Constant<count - 1>());
    }
  }

  // For `height` tiles of keys and `width` tiles of rows at a time.
  template <int height, int width>
  static void ScoreAll(const HeadRows& keys, const Queries& queries, float* scores, Ahead& ahead) {
    int64_t p = 0;
    for (; p + height * kTileRows <= keys.count; p += height * kTileRows) {
      ScoreKeys<height, width>(keys, p, queries, scores, ahead);
    }
    for (; p < keys.count; p += kTileRows) ScoreKeys<1, width>(keys, p, queries, scores, ahead);
  }

  // `height` tiles of keys from position p, which all rows meet in turn.
  template <int height, int width>
  static void ScoreKeys(const HeadRows& keys, int64_t p, const Queries& queries, float* scores,
                        Ahead& ahead) {
    int64_t r = 0;
    for (; r + width * kTileWords <= queries.rows; r += width * kTileWords) {
      ScoreTiles<height, width>(keys, p, queries, r, scores, ahead);
    }
    if (r < queries.rows) ScoreTiles<height, 1>(keys, p, queries, r, scores, ahead);
  }

  template <int height, int width>
  static void ScoreTiles(const HeadRows& keys, int64_t p, const Queries& queries, int64_t r,
                         float* scores, Ahead& ahead) {
    const int64_t rows = queries.rows;
    ForEach<height * width>([](auto i) { ClearTile<kScores[i()]>(); });
    for (int64_t w = 0; w < queries.row_words; w += kTileWords) {
      ForEach<width>([&](auto j) {
        LoadTile<kQueries[j()]>(queries.words + w * rows + r + j() * kTileWords, 4 * rows);
      });
      ForEach<height>([&](auto i) {
        LoadTile<kFull>(keys.first + (p + i() * kTileRows) * keys.stride + 4 * w, keys.stride);
        ForEach<width>(
            [&](auto j) { MultiplyTiles<kScores[i() * width + j()], kFull, kQueries[j()]>(); });
        ahead.Step(width * kScoreSteps);
      });
    }
    ForEach<height * width>([&](auto i) {
      float* const target = scores + (p + i() / width * kTileRows) * rows + r;
      StoreTile<kScores[i()]>(target + i() % width * kTileWords, 4 * rows);
    });
  }

  // Adds the weighted values to `height` tiles of rows from row r and `width` tiles of columns from
  // column c.
  template <int height, int width>
  static void WeighTiles(const Weighing& weighing, int64_t r, int64_t c, float* sums,
                         Ahead& ahead) {
    const int64_t stride = 4 * weighing.columns;
    const auto sum = [&](int64_t i) {
      return sums + (r + i / width * kTileRows) * weighing.columns + c + i % width * kTileWords;
    };
    ForEach<height * width>([&](auto i) { LoadTile<kSums[i()]>(sum(i()), stride); });
    for (int64_t s = 0; s < weighing.steps; s += kTileRows) {
      ForEach<height>([&](auto i) {
        const int64_t row = r + i() * kTileRows;
        LoadTile<kWeights[i()]>(weighing.weights + s * weighing.stride + row * kTileRows,
                                4 * kTileWords);
      });
      ForEach<width>([&](auto j) {
        LoadTile<kFull>(weighing.values + s * weighing.columns + c + j() * kTileWords, stride);
        ForEach<height>(
            [&](auto i) { MultiplyTiles<kSums[i() * width + j()], kWeights[i()], kFull>(); });
        ahead.Step(height * kWeighSteps);
      });
    }
    ForEach<height * width>([&](auto i) { StoreTile<kSums[i()]>(sum(i()), stride); });
  }
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_AMX_H_
