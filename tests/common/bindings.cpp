// csrc/common as a Python module.  Tensors come and go as flat lists.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "../../csrc/common/acceptance.h"
#include "../../csrc/common/averages.h"
#include "../../csrc/common/damping.h"
#include "../../csrc/common/pair_update.h"
#include "../../csrc/common/recursion.h"
#include "../../csrc/common/secant.h"

namespace {

namespace py = pybind11;
using namespace adaqn;
using Doubles = std::vector<double>;
using Words = std::vector<int64_t>;

Doubles backward(const Doubles& gram, const Words& counters, int slots, const Doubles& u) {
  Doubles a(static_cast<size_t>(slots));
  backward_coefficients(gram.data(), PairRing(counters.data(), slots), u.data(), a.data());
  return a;
}

Doubles forward(const Doubles& gram, const Words& counters, int slots, const Doubles& a,
                const Doubles& z) {
  Doubles c(static_cast<size_t>(slots));
  forward_coefficients(gram.data(), PairRing(counters.data(), slots), a.data(), z.data(), c.data());
  return c;
}

double newest_ratio(const Doubles& gram, const Words& counters, int slots) {
  return scalar_initial_matrix(gram.data(), PairRing(counters.data(), slots));
}

std::pair<bool, Words> step(Words counters, const Doubles& flags, int64_t fisher_size) {
  const bool accepted = step_is_accepted(flags.data(), counters.data());
  count_step(counters.data(), flags.data(), accepted, fisher_size);
  return {accepted, counters};
}

double clip(const Doubles& flags, double max_norm) { return clip_factor(flags.data(), max_norm); }

std::pair<double, double> look_ahead(const Words& counters, double beta) {
  const LookAhead look(counters.data(), beta);
  return {look.of_old, look.of_gradient};
}

/// u from s.m and s.g, and s.m of the new momentum.
std::pair<double, double> follow(const Words& counters, double beta, double s_m, double s_g) {
  const LookAhead look(counters.data(), beta);
  const double u = look.projection(s_m, s_g);
  return {u, look.next_moment(s_m, u)};
}

double correction(const Words& counters, double keep, bool enabled) {
  return bias_correction(counters.data(), keep, enabled);
}

py::tuple pair_update(Words counters, int slots, const Doubles& column, const Doubles& flags,
                      Doubles losses, std::optional<double> loss, double min_curvature,
                      double max_increase, double max_growth, Doubles gram, Doubles moments) {
  const double* monitored = loss ? &*loss : nullptr;
  const PairUpdateRule rule{min_curvature, max_increase, max_growth};
  const PairUpdate outcome = decide_pair_update(counters.data(), slots, column.data(), flags.data(),
                                                losses.data(), monitored, rule);
  record_pair_update(outcome, slots, column.data(), monitored, rule, gram.data(), moments.data(),
                     losses.data(), counters.data());
  return py::make_tuple(static_cast<int>(outcome), gram, moments, losses, counters);
}

Doubles decide_search(Doubles words, const Words& counters, double decrease, double noise,
                      double tolerance_grad, double tolerance_change, int64_t max_trials,
                      int64_t max_iter) {
  decide({decrease, noise, tolerance_grad, tolerance_change, max_trials, max_iter}, counters.data(),
         words.data());
  return words;
}

}  // namespace

PYBIND11_MODULE(adaqn_common_test, m) {
  m.attr("COUNTERS") = std::vector<std::pair<std::string, int>>{
      {"PAIRS", counter::pairs},         {"OLDEST_PAIR", counter::oldest_pair},
      {"GRADIENTS", counter::gradients}, {"NEXT_GRADIENT", counter::next_gradient},
      {"ITERATES", counter::iterates},   {"ANCHORED", counter::anchored},
      {"STORED", counter::stored},       {"SKIPPED", counter::skipped},
      {"RESETS", counter::resets},       {"STEPS_SKIPPED", counter::steps_skipped},
      {"ACCEPTED", counter::accepted},
  };
  m.attr("LOSSES") = std::vector<std::pair<std::string, int>>{{"ANCHOR", loss::anchor},
                                                              {"MONITORED", loss::monitored}};
  // Counted from the end, as in layout.py.
  m.attr("FLAGS") =
      std::vector<std::pair<std::string, int>>{{"NONFINITE", flag::nonfinite - flag::count},
                                               {"NONZERO", flag::nonzero - flag::count},
                                               {"SQUARE", flag::square - flag::count}};
  m.attr("WORDS") = std::vector<std::pair<std::string, int>>{
      {"STEP", word::step},
      {"TRIALS", word::trials},
      {"ITERATIONS", word::iterations},
      {"STATUS", word::status},
      {"TURN", word::turn},
      {"FORGOTTEN", word::forgotten},
      {"TRIAL_LOSS", word::trial_loss},
      {"TRIAL_SLOPE", word::trial_slope},
      {"TRIAL_MAX", word::trial_max},
      {"TRIAL_SUM", word::trial_sum},
      {"TRIAL_NONFINITE", word::trial_nonfinite},
      {"LOSS", word::loss},
      {"SLOPE", word::slope},
      {"GRADIENT_SUM", word::gradient_sum},
      {"DIRECTION_MAX", word::direction_max},
      {"GAMMA", word::gamma},
      {"CURVATURE", word::curvature},
      {"SQUARE", word::square},
      {"TAKEN", word::taken},
      {"MADE", word::made},
      {"JUDGED", word::judged},
  };
  m.attr("TURNS") = std::vector<std::pair<std::string, int>>{
      {"REFUSE", turn::refuse}, {"ACCEPT", turn::accept}, {"FORGET", turn::forget}};
  m.attr("STOPS") = std::vector<std::pair<std::string, int>>{
      {"NOT", stop::none},
      {"GRADIENT", stop::gradient},
      {"STEP", stop::step},
      {"LOSS", stop::loss},
      {"SLOPE", stop::slope},
      {"SEARCH", stop::search},
      {"NONFINITE", stop::nonfinite},
      {"ITERATIONS", stop::iterations},
      {"EVALUATIONS", stop::evaluations},
  };
  m.def("backward", backward);
  m.def("decide", decide_search);
  m.def("forward", forward);
  m.def("scalar_initial_matrix", newest_ratio);
  m.def("step", step);
  m.def("clip_factor", clip);
  m.def("look_ahead", look_ahead);
  m.def("follow", follow);
  m.def("bias_correction", correction);
  m.def("damping_factor", damping_factor);
  m.def("pair_update", pair_update);
}
