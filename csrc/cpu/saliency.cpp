// saliency on the CPU: means of the images, distances of their tokens, weights. What is summed and in which order depends on the
// image alone; sums run in groups of kGroup, so that thousands of tokens cost no accuracy.
#include "../common/parallel.h"
#include "../common/simd.h"

namespace crop::CROP_ISA {
namespace {

constexpr int64_t kChannels = 256;  // of a work item of the means
constexpr int64_t kGroup = 64;
constexpr int64_t kGrain = 1 << 15;  // elements worth a thread

struct Image {
    const int64_t* index;
    int64_t places;
};

// Mean of `count` channels, `tokens` already at the first of them.
template <class T>
void mean_of(const Image& image, const T* tokens, int64_t stride, int64_t count, float* mean) {
    float total[kChannels] = {}, part[kChannels];
    int64_t members = 0;
    for (int64_t first = 0; first < image.places; first += kGroup) {
        for (int64_t c = 0; c < count; ++c) part[c] = 0;
        for (int64_t n = first; n < image.places && n < first + kGroup; ++n) {
            if (image.index[n] < 0) continue;
            ++members;
            const T* row = tokens + image.index[n] * stride;
            int64_t c = 0;
            for (; c + kLanes <= count; c += kLanes) store(part + c, load<Vec>(part + c) + load_vec(row + c));
            for (; c < count; ++c) part[c] += load_one(row + c);
        }
        for (int64_t c = 0; c < count; ++c) total[c] += part[c];
    }
    const float tokens_of_image = static_cast<float>(members > 1 ? members : 1);
    for (int64_t c = 0; c < count; ++c) mean[c] = total[c] / tokens_of_image;
}

float root(float x) { return __builtin_sqrtf(x); }

// 1 - cosine of a token and the mean.
template <class T>
float distance(const T* row, const float* mean, int64_t dim) {
    Vec dots = Vec{}, squares = Vec{}, lengths = Vec{};
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) {
        const Vec x = load_vec(row + c), y = load<Vec>(mean + c);
        dots += x * y, squares += x * x, lengths += y * y;
    }
    float dot = sum(dots), square = sum(squares), length = sum(lengths);
    for (; c < dim; ++c) {
        const float x = load_one(row + c), y = mean[c];
        dot += x * y, square += x * x, length += y * y;
    }
    const float norm = root(square) * root(length);
    return 1.0f - dot / (norm < 1e-12f ? 1e-12f : norm);
}

// Sum of f(distance) over the tokens of an image.
template <class F>
float sum_of(const Image& image, const float* weight, F f) {
    float total = 0;
    for (int64_t first = 0; first < image.places; first += kGroup) {
        float part = 0;
        for (int64_t n = first; n < image.places && n < first + kGroup; ++n)
            if (image.index[n] >= 0) part += f(weight[image.index[n]]);
        total += part;
    }
    return total;
}

// Distances become weights.
void weigh(const SaliencyParams& p, const Image& image) {
    int64_t members = 0;
    for (int64_t n = 0; n < image.places; ++n) members += image.index[n] >= 0;
    const float count = static_cast<float>(members > 1 ? members : 1);
    const float middle = sum_of(image, p.weight, [](float x) { return x; }) / count;
    const float square = sum_of(image, p.weight, [middle](float x) { return (x - middle) * (x - middle); });
    const float spread = root(square / count) + p.flat;
    for (int64_t first = 0; first < image.places; first += kLanes) {
        float z[kLanes] = {};
        for (int64_t n = first; n < image.places && n < first + kLanes; ++n) {
            if (image.index[n] < 0) continue;
            const float x = (p.weight[image.index[n]] - middle) / spread;
            z[n - first] = p.sharpness * (x < -p.farthest ? -p.farthest : x > p.farthest ? p.farthest : x);  // NaN stays
        }
        store(z, exp(load<Vec>(z)));
        for (int64_t n = first; n < image.places && n < first + kLanes; ++n) {
            const int64_t row = image.index[n];
            if (row >= 0) p.weight[row] = p.alone && p.alone[row] ? 1.0f : z[n - first];
        }
    }
}

template <class T>
void saliency_of(const SaliencyParams& p, int threads) {
    const T* tokens = static_cast<const T*>(p.tokens);
    const int64_t slabs = (p.dim + kChannels - 1) / kChannels, groups = (p.num_places + kGroup - 1) / kGroup;
    const int workers = useful_threads(threads, p.num_images * p.num_places * p.dim, kGrain);
    auto image_of = [&](int64_t image) { return Image{p.index + image * p.num_places, p.num_places}; };
    auto means = [&](int64_t item) {
        const int64_t image = item / slabs, first = item % slabs * kChannels;
        const int64_t count = p.dim - first < kChannels ? p.dim - first : kChannels;
        mean_of(image_of(image), tokens + first, p.token_stride, count, p.mean + image * p.dim + first);
    };
    parallel_for(workers, p.num_images * slabs, means);
    auto distances = [&](int64_t item) {
        const int64_t image = item / groups, first = item % groups * kGroup;
        for (int64_t n = first; n < p.num_places && n < first + kGroup; ++n) {
            const int64_t row = p.index[image * p.num_places + n];
            if (row >= 0) p.weight[row] = distance(tokens + row * p.token_stride, p.mean + image * p.dim, p.dim);
        }
    };
    parallel_for(workers, p.num_images * groups, distances);
    auto weights = [&](int64_t image) { weigh(p, image_of(image)); };
    parallel_for(useful_threads(threads, p.num_images * p.num_places, kGrain), p.num_images, weights);
}

}  // namespace

int saliency(const SaliencyParams& p, int threads) {
    for (int64_t n = 0; n < p.num_images * p.num_places; ++n)
        if (p.index[n] < -1 || p.index[n] >= p.num_tokens)
            return fail("saliency: index must be at least -1 and less than %lld, got %lld", (long long)p.num_tokens,
                        (long long)p.index[n]);
    for (int64_t n = 0; n < p.num_tokens; ++n) p.weight[n] = 1.0f;
    return dispatch_dtype("saliency", p.dtype, [&](auto zero) { return saliency_of<decltype(zero)>(p, threads), 0; });
}

}  // namespace crop::CROP_ISA
