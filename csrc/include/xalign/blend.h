// Which source gives the next sample: earliest deadline first, in exact integer arithmetic.
//
// Every choice depends on the targets and on what was drawn before, never on how long the run will be, so a shorter run
// is the beginning of a longer one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace xalign {

// One source per sample such that after any k samples source j has given strictly less than one sample more or less
// than k * weights[j] / sum(weights) (Tijdeman 1980, "The chairman assignment problem"; as a schedule of unit jobs:
// Steiner and Yeomans 1993). Equal deadlines go to the lower index. Time O(num_samples * log(num_sources)).
// Throws std::invalid_argument if there is no source, a weight is negative, all are zero, their sum overflows int64, or
// num_samples is negative.
std::vector<std::int32_t> blend_order(const std::int64_t* weights, std::size_t num_sources, std::int64_t num_samples);

// The windows of one source in the order they are to be drawn.
struct WindowCounts {
  const std::int32_t* content;  // [num_windows, num_languages], row-major: content tokens of each language
  std::int64_t num_windows;
};

// What a blend of windows is to hold to. Weights and shares are integers of any common scale, at most 2^60 in sum.
struct BlendTarget {
  std::int64_t seq_length;               // tokens of a window
  std::int64_t parallel_numerator;       // parallel tokens / all tokens, 0 <= numerator <= denominator
  std::int64_t parallel_denominator;     // at most 2^60
  bool count_all_tokens;                 // the fraction counts all tokens of a window, not its content tokens
  bool parallel_fills_languages;         // language shares count parallel tokens too ("replace"), or not ("add")
  std::vector<std::int64_t> language_shares;  // [num_languages], 0: not held to anything
  // [num_languages], about the part of its share that monolingual text has to give. It only ranks deadlines; what is
  // held to is language_shares.
  std::vector<std::int64_t> language_rates;
  std::vector<std::int32_t> language_of_source;  // [num_sources], -1: parallel
  std::vector<std::int64_t> source_weights;      // [num_sources], within its language's (or all parallel) sources
};

// A choice looks at the next window of every source; a source whose next window is not there ends the blend, so that no
// choice ever depends on how many windows were handed in.
struct BlendOfWindows {
  std::vector<std::int32_t> source_of_sample;  // shorter than asked for if a source ran out
  std::int32_t exhausted_source;               // that source, or -1
};

// Blends windows whose content differs, counting tokens as they are drawn. Three decisions per sample:
//   1. parallel or monolingual: whichever leaves the parallel tokens nearer to their fraction of all tokens drawn (so
//      they are never more than about half a window away);
//   2. if monolingual, the language by earliest deadline of its share, where its parallel tokens count as drawn;
//   3. the source among those of the language (or among the parallel ones) by earliest deadline of its weight.
// Time O(num_samples * (num_sources + num_languages)). Throws std::invalid_argument on contradictory sizes, negative
// numbers, sums above 2^60, windows with more content than seq_length, a fraction without parallel sources, or shares
// without monolingual ones.
BlendOfWindows blend_windows(const BlendTarget& target, const std::vector<WindowCounts>& sources,
                             std::int64_t num_samples);

}  // namespace xalign
