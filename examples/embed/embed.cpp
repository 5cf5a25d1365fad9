// Generates from a Galerne bundle in a C++ program: one thread for each prompt, one model for all of them.
//
//     embed BUNDLE MAX_NEW_TOKENS PROMPT [PROMPT ...]
//
// Each token goes to stdout when it is known, as a line: the prompt's number, the token's id, the text that became certain
// (with line ends as \n). Logits are read and token ids handed over where they lie: nothing is copied between C++ and Python.

#include <pybind11/embed.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

std::mutex output;

void print_token(int prompt, std::int64_t id, const std::string& text) {
    std::string line;
    for (const char c : text) line += c == '\n' ? std::string("\\n") : std::string(1, c);
    const std::lock_guard<std::mutex> lock(output);
    std::cout << prompt << '\t' << id << '\t' << line << std::endl;
}

// What the threads share. Sessions are not shared: a model serves any number of them at once, a session one thread.
struct Shared {
    py::object model;
    py::object tokenizer;
    std::vector<std::int64_t> ends;
};

// Runs in a thread that Python does not know: it takes the GIL for the calls into Python, and nowhere else. During a call the
// engine lets go of the GIL while it computes, so the threads' steps overlap.
void generate(const Shared& shared, int number, const std::string& prompt, int max_new_tokens) {
    const py::gil_scoped_acquire gil;
    py::object session = shared.model.attr("session")();
    py::object stream = shared.tokenizer.attr("stream")();
    session.attr("append")(shared.tokenizer.attr("encode")(prompt));

    // The session's own memory, the same at every step: taken once, held by this reference for as long as it is needed.
    const auto logits = session.attr("logits").cast<py::array_t<float, py::array::c_style>>();
    const float* const first = logits.data();
    const float* const last = first + logits.size();

    // One id in memory of ours, which Python reads in place through the buffer protocol.
    std::int64_t id = 0;
    const auto next = py::memoryview::from_buffer(&id, {py::ssize_t{1}}, {py::ssize_t{sizeof id}});

    const auto append = session.attr("append");
    const auto push = stream.attr("push");
    for (int step = 0; step < max_new_tokens; ++step) {
        {
            const py::gil_scoped_release others;  // C++ work of any length: here it is only the largest logit
            id = std::max_element(first, last) - first;
        }
        if (std::find(shared.ends.begin(), shared.ends.end(), id) != shared.ends.end()) break;
        print_token(number, id, push(id).cast<std::string>());
        if (step + 1 < max_new_tokens) append(next);
    }
    session.attr("close")();
}

int run(const std::string& bundle, int max_new_tokens, const std::vector<std::string>& prompts) {
    const auto path = py::module_::import("pathlib").attr("Path")(bundle);
    Shared shared;
    shared.model = py::module_::import("galerne.runtime.model").attr("Model").attr("open")(path);
    shared.tokenizer =
        py::module_::import("galerne.runtime.tokenizer").attr("Tokenizer").attr("open")(shared.model.attr("bundle"));
    shared.ends = shared.model.attr("facts").attr("eos_token_ids").cast<std::vector<std::int64_t>>();

    std::atomic<bool> done{false};
    std::atomic<int> failed{0};
    double longest_wait_ms = 0;
    {
        // While this thread only waits, it must not keep the GIL from the others.
        const py::gil_scoped_release others;
        std::vector<std::thread> threads;
        for (std::size_t i = 0; i < prompts.size(); ++i) {
            threads.emplace_back([&, i] {
                try {
                    generate(shared, static_cast<int>(i), prompts[i], max_new_tokens);
                } catch (const std::exception& error) {  // py::error_already_set tells the Python error in one line
                    const std::lock_guard<std::mutex> lock(output);
                    std::cerr << "embed: prompt " << i << ": " << error.what() << std::endl;
                    ++failed;
                }
            });
        }
        // What a GUI or a server would feel: how long another thread waits for the GIL at most.
        std::thread heartbeat([&] {
            while (!done) {
                const auto before = std::chrono::steady_clock::now();
                { const py::gil_scoped_acquire gil; }
                const std::chrono::duration<double, std::milli> waited = std::chrono::steady_clock::now() - before;
                longest_wait_ms = std::max(longest_wait_ms, waited.count());
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
        });
        for (auto& thread : threads) thread.join();
        done = true;
        heartbeat.join();
    }
    std::cerr << "longest wait for the GIL: " << longest_wait_ms << " ms" << std::endl;
    shared.model.attr("close")();
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 4) {
        std::cerr << "usage: embed BUNDLE MAX_NEW_TOKENS PROMPT [PROMPT ...]" << std::endl;
        return 2;
    }
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    // The virtual environment that it was built with, and so the packages in there.
    PyConfig_SetBytesString(&config, &config.program_name, PYTHON_EXECUTABLE);
    config.install_signal_handlers = 0;  // Ctrl-C stays this program's: Python would only look at it in this thread
    const py::scoped_interpreter python(&config);  // ends last: no Python object outlives it
    try {
        return run(argv[1], std::atoi(argv[2]), {argv + 3, argv + argc});
    } catch (py::error_already_set& error) {
        // Galerne's own errors carry the exit status that its command would end with, and are one line.
        const bool own = py::hasattr(error.value(), "exit_code");
        std::cerr << "embed: " << (own ? py::str(error.value()).cast<std::string>() : error.what()) << std::endl;
        return own ? error.value().attr("exit_code").cast<int>() : EXIT_FAILURE;
    } catch (const std::exception& error) {
        std::cerr << "embed: " << error.what() << std::endl;
        return EXIT_FAILURE;
    }
}
