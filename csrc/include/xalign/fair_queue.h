// Sources that share what their group gives: who comes next, by earliest deadline, in O(log sources).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace xalign {

// Each member is to give weight / (sum of weights) of the tokens that all of them give, in pieces whose sizes are known
// one ahead. The next is the member with the earliest deadline, the moment (in tokens of the group) when it would be a
// whole piece behind its quota, among those that would not be a whole piece ahead of it after theirs; the lower one
// where deadlines are equal. A piece is `window` tokens for this, or its own size where that is 0 (documents). Exact
// integers throughout. With pieces of one size this is Tijdeman's order: every member is less than one piece from its
// quota at every moment; otherwise less than the largest piece.
class FairQueue {
 public:
  // Weights must be positive and add up to 2^60 at most; 0 <= window <= 2^60. Throws std::invalid_argument otherwise.
  FairQueue(std::vector<std::int64_t> weights, std::int64_t window);

  std::size_t num_members() const { return members_.size(); }
  // Tells the size of a member's next piece (0 <= size, <= window where that is above 0). Every member must have one
  // before best() is asked. Throws std::out_of_range if there is no such member, std::invalid_argument if it has a piece
  // or the size is outside, std::overflow_error where all pieces would add up to more than 2^61.
  void offer(std::size_t member, std::int64_t size);
  // The member that comes next. Throws std::logic_error if not every member has a piece or there is none.
  std::size_t best();
  std::int64_t size_of(std::size_t member) const { return members_[member].size; }
  // Takes the piece of best(); the member then has none until offer(). Throws as best().
  void take_best();

 private:
  struct Member {
    std::int64_t weight;
    std::int64_t given = 0;
    std::int64_t size = -1;  // of the next piece; -1: none
  };
  struct Ready {
    std::int64_t deadline;  // as the tokens the member would be behind at, times total / weight
    std::int64_t weight;
    std::size_t member;
  };
  struct Waiting {
    std::int64_t from;  // tokens of the group
    std::size_t member;
  };
  static bool later(const Ready& a, const Ready& b);
  static bool after(const Waiting& a, const Waiting& b);
  void make_ready(std::size_t member);

  std::vector<Member> members_;
  std::int64_t window_;
  std::int64_t total_ = 0;
  std::int64_t given_ = 0;
  std::size_t offered_ = 0;
  std::vector<Ready> ready_;
  std::vector<Waiting> waiting_;
};

}  // namespace xalign
