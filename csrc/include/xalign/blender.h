// Which source gives the next window or document, counting what those that were drawn really hold.
//
// No choice depends on the length of the run or on how much was fed at a time, so a shorter run is the beginning of a
// longer one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "xalign/blend_tally.h"
#include "xalign/fair_queue.h"
#include "xalign/fraction_schedule.h"
#include "xalign/order_store.h"

namespace xalign {

// What a blend is to hold to. Weights and shares are integers of any common scale, at most 2^60 in sum.
struct BlendTarget {
  std::int64_t seq_length = 0;
  std::int64_t num_samples = 0;
  std::int64_t denominator = 1;             // of the fractions, at most 2^60
  std::vector<FractionPhase> phases;        // parallel tokens / all tokens
  bool count_all_tokens = false;            // the fraction counts all tokens of a row, not its content tokens
  bool parallel_fills_languages = true;     // language shares count parallel tokens too ("replace"), or not ("add")
  std::vector<std::int64_t> language_shares;  // [num_languages], 0: not held to anything
  // [num_languages] each, about the part of its share that monolingual text has to give, at a fraction of 0 and of 1,
  // in between in a straight line; negative: parallel text brings more. They only rank deadlines; what is held to is
  // language_shares. At most 2^31 either way.
  std::vector<std::int64_t> language_rates_without;
  std::vector<std::int64_t> language_rates_with;
  std::vector<std::int32_t> group_of_source;  // [num_sources] the language, or -1: parallel
  std::vector<std::int64_t> source_weights;   // [num_sources], within its language's (or all parallel) sources; 0: none
  // [num_sources] languages that the source has tokens of: the columns of what it is fed.
  std::vector<std::vector<std::int32_t>> languages_of_source;
  bool documents = false;         // rows are documents and not windows
  bool keep_pairs_whole = false;  // parallel documents stay inside one sample; windows come that way
  std::int64_t batch_size = 1;    // for the tally of slots
  std::uint64_t batch_key = 0;
};

// Blends windows (or documents) whose content differs. Three decisions per row:
//   1. parallel or monolingual: whichever leaves the parallel tokens nearer to the sum of each row's counted tokens
//      times the fraction that its sample is asked to have; monolingual if both are as near. In samples of fraction 0
//      there is none, in samples of fraction 1 nothing else;
//   2. if monolingual, the language by earliest deadline of its share, where its parallel tokens count as drawn;
//   3. the source among those of the language (or among the parallel ones) as FairQueue has it.
// So after any row the parallel tokens are at most half of the largest window or document off (documents that are
// kept whole and do not fit: a whole one), a source less than one piece within its group.
//
// keep_pairs_whole with documents: a parallel document that does not fit into what is left of its sample waits and
// monolingual text fills the sample. Where there is none, or it would take the fraction further off than the larger of
// the two documents, the rest of the sample is padding. A parallel document longer than a sample is a row, so that draws
// can be counted, and takes no place. So does a document of no tokens.
//
// Time O(log sources + languages) per row; memory that of what is fed and not yet drawn.
class Blender {
 public:
  // Throws std::invalid_argument on contradictory sizes, negative numbers, sums above 2^60, a fraction without parallel
  // sources, or shares without monolingual ones.
  explicit Blender(BlendTarget target);

  // The next draws of a source: content [num_draws, languages of the source] row-major, tokens (padding excluded) and
  // tokens whose label bears loss [num_draws]. The last token of a document bears none if there is one that does not.
  // Copied. Throws std::invalid_argument on negative numbers, content or loss above tokens, windows of more than
  // seq_length tokens; the draws before the wrong one are kept.
  void feed(std::int32_t source, const std::int32_t* content, const std::int32_t* tokens, const std::int32_t* loss,
            std::size_t num_draws);

  struct Status {
    std::int32_t hungry_source;  // has to be fed first; -1: none
    bool done;                   // all samples are there
  };
  // Chooses rows until there are max_rows more, all samples are there, or a source has to be fed.
  Status run(std::size_t max_rows);

  // What run() added since the last call.
  std::vector<std::uint16_t> take_rows();
  std::vector<SampleBorder> take_borders();  // documents only; of samples that are whole
  std::vector<CutPiece> take_cut_pieces();   // documents only; content to be handed to tally().add_content

  std::int64_t num_samples() const { return sample_; }  // whole ones so far
  BlendTally& tally() { return tally_; }
  const std::vector<std::int64_t>& draws() const { return drawn_; }  // rows of each source so far
  // The largest distance after any row: of the parallel tokens from what was asked, times the denominator; of a
  // language's tokens from its share, times the sum of shares.
  std::int64_t largest_row() const { return largest_row_; }  // counted tokens of a window or document drawn
  int128 worst_parallel() const { return worst_parallel_; }
  std::vector<int128> worst_languages() const;

 private:
  struct Supply {
    std::vector<std::int32_t> columns;  // languages of the source
    std::vector<std::int32_t> rows;     // of what was fed: content by column, tokens, loss
    std::size_t next = 0;               // the row that comes next
    std::size_t width = 0;
    std::size_t group = 0;
    std::size_t member = 0;  // in its group
  };
  struct Group {
    std::vector<std::int32_t> sources;
    std::unique_ptr<FairQueue> queue;
  };
  struct Head {
    std::int32_t source;
    std::int64_t content, tokens, counted;
  };

  struct Language {
    std::size_t index;
    std::int64_t share;
    std::int64_t given = 0;  // tokens so far
    std::int64_t size = 0;   // of its next piece
    std::int64_t rate = 1;   // of the fraction rates_at_
    int128 worst = 0;        // the largest distance from its share, times all_shares_
  };

  const std::int32_t* row_of(std::int32_t source) const;
  bool look(std::int32_t source);  // offers the next draw to the group; false if it has to be fed first
  Head head_of(std::size_t group);
  void update_rates();
  int128 owed(const Language& language) const;  // all_shares_ * (share of what was drawn - what it drew itself)
  std::int32_t next_language();
  void choose();
  void take(std::size_t group);
  void place_window(std::int32_t source);
  void place_document(std::int32_t source);
  void pad();
  void end_sample(std::int64_t padding);

  BlendTarget target_;
  FractionSchedule schedule_;
  BlendTally tally_;
  std::vector<Supply> supplies_;
  std::vector<Group> groups_;        // one per language, the parallel sources last
  std::vector<std::int32_t> hungry_;  // sources to look at again, the last one first
  std::vector<std::size_t> changed_;  // groups whose best member is to be found again
  std::int64_t all_shares_ = 0;
  std::vector<Language> held_;            // languages with a share
  std::vector<std::int32_t> held_index_;  // of a language in held_, or -1
  std::int64_t steered_ = 0;              // tokens of all of them so far
  std::int64_t rates_at_ = -1;
  int128 surplus_ = 0;        // denominator * (parallel tokens - those asked for)
  std::int64_t largest_row_ = 0;
  int128 worst_parallel_ = 0;
  std::vector<std::int64_t> drawn_;

  std::int64_t sample_ = 0;
  std::int64_t filled_ = 0;  // tokens of the sample, documents only
  bool border_is_next_ = true;
  std::int32_t last_source_ = -1;
  bool last_bears_loss_ = false;
  std::int64_t last_padding_ = 0;  // of the sample that ended last
  std::int64_t numerator_ = 0;  // of sample_
  std::int64_t rows_taken_ = 0;
  std::vector<std::uint16_t> rows_;
  std::vector<SampleBorder> borders_;  // the last one may be of a sample that is not whole
  std::vector<CutPiece> cut_pieces_;
};

}  // namespace xalign
