// Scores frames of raw pixels (RGB24) on stdin with an exported detector, and prints a line for each: its number, its
// score, and the number of the class that it looks most like.
//
//   usage: score MODEL.onnx < frames
//
// The frames have the size that the model takes: that of the camera, if it was given to `uadtool export --input-size`.
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <vector>

static Ort::SessionOptions options() {
    Ort::SessionOptions options;
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
#if defined(__x86_64__)
    // Without VNNI, int8 products overflow in 16 bits unless weights become unsigned.
    if (!__builtin_cpu_supports("avx512vnni"))
        options.AddConfigEntry("session.x64quantprecision", "1");
#endif
    return options;
}

int main(int count, char** arguments) try {
    if (count != 2) {
        std::fprintf(stderr, "usage: score MODEL.onnx < frames\n");
        return 2;
    }
    Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "score");
    Ort::Session session(environment, arguments[1], options());

    const Ort::TypeInfo type = session.GetInputTypeInfo(0);
    std::vector<int64_t> shape = type.GetTensorTypeAndShapeInfo().GetShape();  // images, height, width, channels
    shape[0] = 1;
    std::vector<uint8_t> pixels(shape[1] * shape[2] * shape[3]);
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const auto image = Ort::Value::CreateTensor<uint8_t>(memory, pixels.data(), pixels.size(), shape.data(), 4);

    const char* inputs[] = {"image"};
    const char* outputs[] = {"score", "nearest_class"};  // also raw_score, anomaly_map and class_distance
    size_t read;
    for (long frame = 1; (read = std::fread(pixels.data(), 1, pixels.size(), stdin)) == pixels.size(); ++frame) {
        const auto found = session.Run(Ort::RunOptions{nullptr}, inputs, &image, 1, outputs, 2);
        std::printf("%ld\t%.6g\t%d\n", frame, found[0].GetTensorData<float>()[0], found[1].GetTensorData<int32_t>()[0]);
        std::fflush(stdout);
    }
    if (read) {
        std::fprintf(stderr, "score: error: the last frame has %zu of %zu bytes\n", read, pixels.size());
        return 1;
    }
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "score: error: %s\n", error.what());
    return 1;
}
