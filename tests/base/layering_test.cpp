// The layering of the sources, read from their #include lines:
//   base <- core <- graph <- ops <- {model, optim, dist} <- {train, merge} <- apps
//   io sees base and core, report sees base; kernels/ sees core, graph and the contracts in ops and optim.
// Siblings do not include each other, and no header of src/ includes one of CUDA, NCCL, MPI, Eigen or a BLAS.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "catch.h"

namespace {

using Folders = std::set<std::string>;
namespace fs = std::filesystem;

/// Whose headers a folder may include, besides its own.
const std::map<std::string, Folders>& visible_folders() {
  static const Folders members{"base", "core", "graph", "ops", "model", "optim", "dist", "io", "report"};
  static const std::map<std::string, Folders> visible = [] {
    std::map<std::string, Folders> table{
        {"base", {}},
        {"core", {"base"}},
        {"graph", {"base", "core"}},
        {"ops", {"base", "core", "graph"}},
        {"model", {"base", "core", "graph", "ops"}},
        {"optim", {"base", "core", "graph", "ops"}},
        {"dist", {"base", "core", "graph", "ops"}},
        {"io", {"base", "core"}},
        {"report", {"base"}},
        {"kernels", {"base", "core", "graph", "ops", "optim"}},
        {"train", members},
        {"merge", members},
        {"apps", members},
    };
    table["train"].insert("kernels");  // captures and replays the device's graph
    table["apps"].insert({"train", "merge"});
    return table;
  }();
  return visible;
}

/// One file as the rules see it: its folder, and whether it is a header of src/.
struct Source {
  std::string folder;
  bool header;
};

/// What is wrong with one line of a source; empty when nothing is.
std::string fault(const Source& source, const std::string& line) {
  static const std::regex include(R"(^\s*#\s*include\s*([<"])([^>"]+)[>"])");
  static const std::regex vendor(
      "^(cuda|cublas|cusolver|cusparse|curand|nccl|mpi\\.h|mpi-ext|omp\\.h|cblas|openblas|"
      "lapacke|Eigen/|unsupported/Eigen/|eigen3/)");
  std::smatch match;
  if (!std::regex_search(line, match, include)) return {};
  const std::string path = match[2];
  if (source.header && std::regex_search(path, vendor)) return "a header includes " + path;
  if (match[1] == "<") return {};
  const std::string folder = path.substr(0, path.find('/'));
  if (folder.size() == path.size()) return "\"" + path + "\" does not name its folder";
  if (folder == source.folder) return {};
  if (visible_folders().count(folder) == 0) return "\"" + path + "\" is in no folder of the layering";
  if (visible_folders().at(source.folder).count(folder) == 0) return source.folder + "/ may not include " + path;
  return {};
}

bool is_source(const fs::path& path) {
  static const std::set<std::string> extensions{".h", ".cuh", ".cpp", ".cu"};
  return extensions.count(path.extension().string()) != 0;
}

std::vector<fs::path> sources_below(const fs::path& directory) {
  std::vector<fs::path> files;
  if (!fs::exists(directory)) return files;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(directory))
    if (entry.is_regular_file() && is_source(entry.path())) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

/// "path:line: fault" for every line of a file that breaks a rule.
std::vector<std::string> faults_of(const fs::path& root, const fs::path& file, const Source& source) {
  std::vector<std::string> faults;
  std::ifstream stream(file);
  std::string line;
  for (int number = 1; std::getline(stream, line); ++number)
    if (const std::string found = fault(source, line); !found.empty())
      faults.push_back(fs::relative(file, root).string() + ":" + std::to_string(number) + ": " + found);
  return faults;
}

}  // namespace

TEST_CASE("sources follow the layering") {
  const fs::path root = KILN_SOURCE_DIR;
  Folders folders;
  std::vector<std::string> faults;
  auto scan = [&](const fs::path& file, const Source& source) {
    const std::vector<std::string> found = faults_of(root, file, source);
    faults.insert(faults.end(), found.begin(), found.end());
  };
  for (const fs::path& file : sources_below(root / "src")) {
    const std::string folder = fs::relative(file, root / "src").begin()->string();
    CAPTURE(file.string());
    REQUIRE(visible_folders().count(folder) == 1);
    folders.insert(folder);
    scan(file, {folder, file.extension() == ".h"});
  }
  for (const fs::path& file : sources_below(root / "kernels")) scan(file, {"kernels", false});

  // Every folder of the table holds sources, so that a moved tree cannot pass unread.
  for (const auto& [folder, visible] : visible_folders())
    if (folder != "kernels") CHECK(folders.count(folder) == 1);
  for (const std::string& found : faults) FAIL_CHECK(found);
}

TEST_CASE("the layering rules refuse what they should") {
  const Source core{"core", true}, model{"model", false};
  CHECK(fault(core, "#include \"core/dtype.h\"").empty());
  CHECK(fault(core, "#include \"base/error.h\"").empty());
  CHECK(fault(core, "#include <vector>").empty());
  CHECK(fault(core, "// as <Eigen/Core> does").empty());
  CHECK_THAT(fault(core, "#include \"graph/plan.h\""), ContainsSubstring("core/ may not include graph/plan.h"));
  CHECK_THAT(fault(model, "  #  include \"optim/adam.h\""), ContainsSubstring("model/ may not include"));
  CHECK_THAT(fault({"io", false}, "#include \"graph/plan.h\""), ContainsSubstring("may not"));
  CHECK_THAT(fault({"report", false}, "#include \"core/dtype.h\""), ContainsSubstring("may not"));
  CHECK_THAT(fault({"merge", false}, "#include \"train/trainer.h\""), ContainsSubstring("may not"));
  CHECK_THAT(fault({"ops", false}, "#include \"kernels/gemm.cuh\""), ContainsSubstring("may not"));
  CHECK_THAT(fault({"kernels", false}, "#include \"train/trainer.h\""), ContainsSubstring("may not"));
  CHECK_THAT(fault(core, "#include \"dtype.h\""), ContainsSubstring("does not name its folder"));
  CHECK_THAT(fault(core, "#include \"utils/x.h\""), ContainsSubstring("no folder"));
}

TEST_CASE("headers hide vendor libraries and sources may use them") {
  for (const char* path : {"cuda_runtime.h", "cublasLt.h", "nccl.h", "mpi.h", "Eigen/Core", "cblas.h", "omp.h"}) {
    const std::string line = "#include <" + std::string(path) + ">";
    CHECK_THAT(fault({"ops", true}, line), ContainsSubstring(path));
    CHECK(fault({"ops", false}, line).empty());
  }
}
