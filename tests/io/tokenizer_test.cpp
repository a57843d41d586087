#include "io/tokenizer.h"

#include <algorithm>

#include "base/error.h"
#include "base/files.h"
#include "catch.h"
#include "corpus_fixture.h"

namespace kiln {
namespace {

using test::error_of;
using test::Scratch;
using test::write_file;

std::string english() {
  std::string text;
  for (int i = 0; i < 300; ++i)
    text += fmt::format("The old man looked at the sea, and {} ships went by the {} harbour in the rain.\n", i, i % 7);
  return text;
}

Tokenizer trained(const Scratch& scratch, std::int64_t vocab_size = 340) {
  write_file(scratch / "text.txt", english());
  train_tokenizer({.inputs = {scratch / "text.txt"}, .model = scratch / "t.model", .vocab_size = vocab_size});
  return Tokenizer(scratch / "t.model");
}

}  // namespace

TEST_CASE("a trained tokenizer has the pieces asked for and leaves one file") {
  const Scratch scratch;
  const Tokenizer tokenizer = trained(scratch);
  CHECK(tokenizer.vocab_size() == 340);
  CHECK(tokenizer.bos() == 1);
  CHECK(tokenizer.eos() == 2);
  CHECK(tokenizer.path() == scratch / "t.model");
  std::vector<std::string> left;
  for (const auto& entry : std::filesystem::directory_iterator(scratch.path()))
    left.push_back(entry.path().filename().string());
  std::sort(left.begin(), left.end());
  CHECK(left == std::vector<std::string>{"t.model", "text.txt"});
  // It learnt: frequent words cost few tokens, and the marks of bos and eos are ordinary text.
  CHECK(tokenizer.encode("The old man looked at the sea").size() <= 10);
  for (const std::int32_t token : tokenizer.encode("<s> and </s> and <unk>")) CHECK(token > 2);
}

TEST_CASE("any UTF-8 comes back as it went in") {
  const Scratch scratch;
  const Tokenizer tokenizer = trained(scratch);
  for (const std::string text : {
           "The old man looked at the sea.",
           "two  spaces, three   and a tab\tand trailing  ",
           "  leading spaces",
           " ",
           "\n",
           "line one\nline two\r\n\n\nline five\n",
           "caf\u00e9 na\u00efve \u201cquotes\u201d \u2014 \u00a0no-break \u2026",
           "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0 \u0420\u0443\u0441\u0441\u043a\u0438\u0439 "
           "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
           "\U0001F642\U0001F468\u200D\U0001F469\u200D\U0001F467 \U0001F1EC\U0001F1E7 e\u0301 \uFB01 \u2160 \uFF21",
           "<s> </s> <unk> <0x41> \x01\x7f",
           "1234567890 3.14159 0x1F",
           "\ufeffbyte order mark",
       }) {
    const std::vector<std::int32_t> tokens = tokenizer.encode(text);
    for (const std::int32_t token : tokens) {
      CHECK(token > 2);  // bytes stand in for the unknown
      CHECK(token < tokenizer.vocab_size());
    }
    CHECK(tokenizer.decode(tokens) == text);
  }
  CHECK(tokenizer.encode("").empty());
  CHECK(tokenizer.decode({}).empty());
  CHECK(tokenizer.encode("12").size() >= 2);  // digits are split
}

TEST_CASE("training twice on the same text gives the same model") {
  const Scratch one, two;
  const auto pieces = trained(one).encode(english());
  CHECK(trained(two).encode(english()) == pieces);
}

TEST_CASE("paths with blanks and commas, and several inputs, train") {
  const Scratch scratch;
  std::filesystem::create_directories(scratch / "my data, new");
  const auto text = scratch / "my data, new/a b,c.txt", more = scratch / "my data, new/zebras.txt";
  write_file(text, english());
  std::string zebras;
  for (int i = 0; i < 400; ++i) zebras += "zigzag zebras quiz zealous wizards\n";
  write_file(more, zebras);
  const auto model = scratch / "my data, new/the model, v1.2.model";
  train_tokenizer({.inputs = {text, more}, .model = model, .vocab_size = 340});
  const Tokenizer tokenizer(model);
  CHECK(tokenizer.vocab_size() == 340);
  CHECK(tokenizer.encode("zebras").size() <= 2);
}

TEST_CASE("a model name without the usual ending is kept") {
  const Scratch scratch;
  write_file(scratch / "text.txt", english());
  train_tokenizer({.inputs = {scratch / "text.txt"}, .model = scratch / "spm.v2", .vocab_size = 340});
  CHECK(Tokenizer(scratch / "spm.v2").vocab_size() == 340);
}

TEST_CASE("a tokenizer that is missing or is none is a data error that names it") {
  const Scratch scratch;
  const auto open = [&](const std::filesystem::path& path) { return error_of([&] { Tokenizer tokenizer(path); }); };
  write_file(scratch / "notes.model", "no model at all, only words");
  write_file(scratch / "empty.model", "");
  for (const std::string name : {"absent.model", "notes.model", "empty.model"}) {
    const Error error = open(scratch / name);
    CHECK(error.code() == ExitCode::data);
    CHECK_THAT(error.what(), ContainsSubstring(name));
  }
}

TEST_CASE("training that cannot succeed is a data error, and leaves no model") {
  const Scratch scratch;
  write_file(scratch / "text.txt", "A few words.\n");
  write_file(scratch / "empty.txt", "");
  const auto train = [&](const std::string& input, std::int64_t vocab_size) {
    return error_of([&] {
      train_tokenizer({.inputs = {scratch / input}, .model = scratch / "t.model", .vocab_size = vocab_size});
    });
  };
  for (const Error& error :
       {train("text.txt", 32'000), train("text.txt", 20), train("empty.txt", 300), train("absent.txt", 300)}) {
    CHECK(error.code() == ExitCode::data);
    CHECK_THAT(error.what(), ContainsSubstring("t.model"));
  }
  CHECK_FALSE(std::filesystem::exists(scratch / "t.model"));
}

}  // namespace kiln
