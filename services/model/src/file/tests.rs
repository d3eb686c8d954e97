use super::*;

#[test]
fn quantisation_is_no_part_of_a_name() {
    let table = [
        ("SmolLM2-135M-Instruct.Q4_1", "smollm2-135m-instruct"),
        ("smollm2-135m-instruct-q8_0", "smollm2-135m-instruct"),
        ("Llama-3.2-1B-Instruct-Q4_K_M", "llama-3.2-1b-instruct"),
        ("tiny.f16", "tiny"),
        ("tiny_BF16", "tiny"),
        ("model-IQ4_XS", "model"),
        ("qwen-q", "qwen-q"),
        ("q4x-model", "q4x-model"),
        ("My Model (final)", "my-model--final"),
    ];
    for (stem, expected) in table {
        assert_eq!(slug(without_quantisation(stem)), expected, "{stem}");
    }
}
