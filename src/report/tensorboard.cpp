#include "report/tensorboard.h"

#include <unistd.h>

#include <array>
#include <chrono>
#include <type_traits>

#include "base/error.h"
#include "report/fixed_text.h"

namespace kiln {
namespace {

constexpr std::string_view kPrefix = "events.out.tfevents.";

double wall_time_s() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

/// Makes the directory; true when it holds event files already.
bool has_events(const std::filesystem::path& dir) {
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error)
    fail(ExitCode::data, "{}: the directory for TensorBoard cannot be made ({}); check the path and its permissions",
         dir.string(), error.message());
  for (const auto& entry : std::filesystem::directory_iterator(dir))
    if (entry.path().filename().string().starts_with(kPrefix)) return true;
  return false;
}

/// A new file whose name sorts after those of before: TensorBoard reads them in the order of their names.
AppendFile open_next(const std::filesystem::path& dir) {
  std::array<char, 256> host{"localhost"};
  ::gethostname(host.data(), host.size() - 1);
  for (auto second = static_cast<std::int64_t>(wall_time_s());; ++second) {
    AppendFile file(dir / fmt::format("{}{:010}.{}.kiln", kPrefix, second, host.data()), AppendFile::Open::create_new);
    if (file.is_open()) return file;
  }
}

AppendFile open_session(const std::filesystem::path& dir, std::int64_t resume_step) {
  const bool continues = has_events(dir);
  AppendFile file = open_next(dir);
  EventRecord record;
  file.write(record.file_version(wall_time_s()));
  if (continues) file.write(record.session_start(wall_time_s(), resume_step > 0 ? resume_step + 1 : 0));
  return file;
}

}  // namespace

TensorBoardWriter::TensorBoardWriter(const std::filesystem::path& dir, std::int64_t resume_step)
    : file_(open_session(dir, resume_step)) {}

void TensorBoardWriter::scalar(std::string_view tag, double value, std::int64_t step) {
  file_.write(record_.scalar(wall_time_s(), step, tag, static_cast<float>(value)));
}

void TensorBoardWriter::step(const StepMetrics& metrics) {
  visit_fields(metrics, [&](std::string_view key, const auto& value) {
    if (key == "step") return;
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(value)>>) {
      FixedText<64> tag;
      tag.add("train/{}", key);
      scalar(tag.view(), static_cast<double>(value), metrics.step);
    } else if constexpr (std::is_same_v<std::decay_t<decltype(value)>, std::vector<AverageLoss>>) {
      for (const AverageLoss& average : value) {
        FixedText<64> tag;
        tag.add("valid/average_{}", average.window);
        scalar(tag.view(), average.loss, metrics.step);
      }
    } else if constexpr (std::is_same_v<std::decay_t<decltype(value)>, std::optional<RescueEvent>>) {
      if (value) scalar("train/rescue", static_cast<double>(value->number), metrics.step);
    } else if (value) {
      scalar(key == "valid_loss" ? "valid/loss" : "train/average_ms", *value, metrics.step);
    }
  });
}

}  // namespace kiln
