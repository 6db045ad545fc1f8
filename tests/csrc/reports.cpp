// What the emulator reports: once per kind and places, with source lines; the __ubsan_* hooks and AddressSanitizer's findings, too.
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

#include "runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {
namespace {

constexpr size_t kMaxReports = 20;
std::vector<std::string> reports;
std::set<std::array<std::string, 3>> known;
Dl_info library() {
    Dl_info info;
    dladdr(reinterpret_cast<const void*>(&reports), &info);
    return info;
}
uintptr_t base() {
    static const uintptr_t at = reinterpret_cast<uintptr_t>(library().dli_fbase);
    return at;
}

std::string where(Site site) {  // a program counter stays "@offset@" until somebody reads the reports
    char buffer[32];
    if (site.raw & Site::kCounter) {
        std::snprintf(buffer, sizeof(buffer), "@0x%lx@", static_cast<unsigned long>((site.raw & ~Site::kCounter) - base() - 1));
        return buffer;
    }
    if (!site.raw) return "";
    const Where at = std::bit_cast<Where>(site.raw);
    const char* slash = std::strrchr(at.file_name(), '/');
    return std::string(slash ? slash + 1 : at.file_name()) + ":" + std::to_string(at.line());
}

std::string resolved(const std::string& raw) {  // "@offset@" -> "inner.cuh:12 < outer.cuh:34"
    const Dl_info info = library();
    std::string out;
    size_t at = 0;
    for (size_t open; (open = raw.find('@', at)) != raw.npos;) {
        const size_t close = raw.find('@', open + 1);
        out += raw.substr(at, open - at);
        const std::string command = std::string("addr2line -s -i -e '") + info.dli_fname + "' " + raw.substr(open + 1, close - open - 1);
        char line[256];
        const char* between = "";
        if (FILE* pipe = popen(command.c_str(), "r")) {
            while (std::fgets(line, sizeof(line), pipe)) {
                line[std::strcspn(line, "\n (")] = 0;
                if (!std::strstr(line, ".cu")) continue;  // simt.h and the standard library
                out += between, out += line, between = " < ";
            }
            pclose(pipe);
        }
        at = close + 1;
    }
    return out + raw.substr(at);
}

}  // namespace

bool clean() { return reports.empty(); }

std::string text(Site site) { return where(site); }

void report(const std::string& what, Site at, const std::string& then, Site other) {
    if (reports.size() >= kMaxReports || !known.insert({what.substr(0, what.find(':')), where(at), where(other)}).second) return;
    std::string line = what + (at.raw ? " at " + where(at) : "") + then + (other.raw ? " at " + where(other) : "");
    line += std::string(" [") + (now.kernel ? now.kernel->name : "host");
    if (here) {
        const Thread& t = self();
        char buffer[96];
        std::snprintf(buffer, sizeof(buffer), ", block %u,%u,%u, thread %u", t.block.x, t.block.y, t.block.z, t.number);
        line += buffer;
    }
    reports.push_back(line + "]");
    if (std::getenv("EMU_PRINT")) std::fprintf(stderr, "%s\n", reports.back().c_str());  // before a wild access ends it all
}

}  // namespace simt

// The compiler passes a record that starts with file, line and column.
struct Undefined {
    const char* file;
    uint32_t line, column;
};
static void undefined(const char* what, const Undefined* at) {
    const char* slash = std::strrchr(at->file, '/');
    simt::report(std::string("undefined: ") + what + " at " + (slash ? slash + 1 : at->file) + ":" + std::to_string(at->line));
}
#define UNDEFINED(name, what) \
    extern "C" void __ubsan_handle_##name(const Undefined* at) { undefined(what, at); }
UNDEFINED(type_mismatch_v1, "null or misaligned access")
UNDEFINED(add_overflow, "overflow of +")
UNDEFINED(sub_overflow, "overflow of -")
UNDEFINED(mul_overflow, "overflow of *")
UNDEFINED(negate_overflow, "overflow of -")
UNDEFINED(divrem_overflow, "division by zero or overflow")
UNDEFINED(shift_out_of_bounds, "shift by too much")
UNDEFINED(out_of_bounds, "index of an array out of bounds")
UNDEFINED(pointer_overflow, "overflow of an address")
UNDEFINED(load_invalid_value, "invalid bool or enum")
UNDEFINED(builtin_unreachable, "unreachable code")
UNDEFINED(missing_return, "missing return")
UNDEFINED(vla_bound_not_positive, "array of no size")
UNDEFINED(nonnull_arg, "null argument")
UNDEFINED(float_cast_overflow, "conversion of a float out of range")

// All reports since the last call, empty if there is none.
extern "C" [[gnu::visibility("default")]] const char* emu_report() {
    static std::string all;
    all.clear();
    for (const std::string& line : simt::reports) all += simt::resolved(line) + "\n";
    simt::reports.clear(), simt::known.clear();
    return all.c_str();
}

#if defined(__SANITIZE_ADDRESS__)
[[gnu::constructor]] static void watch() {
    __asan_set_error_report_callback([](const char* message) {
        const std::string all = message;
        const size_t first = all.find("ERROR: "), end = all.find(" on ", first), frame = all.find(".cu", first);
        size_t line = all.rfind(' ', frame);
        line = std::min(all.rfind('/', frame), frame) != all.npos ? std::max(line, all.rfind('/', frame)) : line;
        simt::report("asan: " + all.substr(first + 7, end - first - 7) +
                     (frame == all.npos ? "" : " at " + all.substr(line + 1, all.find('\n', frame) - line - 1)));
    });
}
#endif
