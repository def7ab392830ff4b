"Tasks through a quantized cache: scores that do not depend on batching, sizes that fit, and the harness on local files."
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from reference import in_float64
from ndkv.data import EOT, train_tokenizer
from ndkv.evaluate import NOISE, Cell
from ndkv.models import ZOO, save_model, zoo_config
from ndkv.tasks import (ADJECTIVES, NOUNS, RETRIEVAL, TASKS, answer_scores, choice_items, filler, greedy, parse_question, register_lm_eval,
                        retrieval_items, split_tokens, task_scores)

SIZE = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=1024, num_attention_heads=4)


@pytest.fixture(scope='session')
def tokenizer():
    rng = random.Random(0)
    tok = train_tokenizer([filler(rng, 3000) + ' The secret number of the judge. Question: Answer: Words: The value of List of pairs'], 400)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=EOT, pad_token=EOT)


def tiny(name='llama', vocab=400):
    size = SIZE if name == 'neox' else dict(SIZE, num_key_value_heads=2) | ({} if name == 'qwen2' else {'head_dim': 32})
    size = dict(size, sliding_window=48) if 'sliding_window' in ZOO[name] else size
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(zoo_config(name, vocab_size=vocab, **size)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3)
    return model


CELL = Cell(k_bits=3, v_bits=2, window=16, sinks=2, block=8)


@pytest.mark.parametrize('name', list(ZOO))
@pytest.mark.parametrize('batch', [1, 4])
def test_scores_are_those_of_decoding(name, batch):
    model, g = tiny(name), torch.Generator().manual_seed(1)
    items = [(torch.randint(0, 400, (n,), generator=g).tolist(), torch.randint(0, 400, (m,), generator=g).tolist()) for n, m in ((90, 3), (25, 1), (26, 12), (61, 30))]
    for (c, a), (logp, right, n) in zip(items, answer_scores(model, items, CELL, batch, bar=False), strict=True):
        cache, total, hits, out = CELL.cache(model.config, memo=False), 0., 0, None
        with torch.inference_mode():
            for i, t in enumerate(c + a):
                if i >= len(c): total, hits = total + out[t].item(), hits + (out.argmax().item() == t)
                out = model(torch.tensor([[t]]), past_key_values=cache).logits[0, -1].log_softmax(-1)
        assert n == len(a) and hits == right and abs(total - logp) < 2e-3 * n


def test_exact_cell_gives_one_forward_pass():
    model, g = tiny(), torch.Generator().manual_seed(2)
    c, a = torch.randint(0, 400, (70,), generator=g).tolist(), torch.randint(0, 400, (9,), generator=g).tolist()
    with torch.no_grad(): logp = model(torch.tensor([c + a])).logits[0].log_softmax(-1)
    want = sum(logp[len(c) - 1 + i, t].item() for i, t in enumerate(a))
    assert abs(answer_scores(model, [(c, a)], NOISE, bar=False)[0][0] - want) < 1e-3


def test_greedy_is_what_generate_writes():
    model, g = in_float64(tiny()), torch.Generator().manual_seed(3)
    ids = torch.randint(0, 400, (1, 40), generator=g)
    want = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 40:].tolist()
    assert greedy(model, ids[0].tolist(), NOISE, 9) == want
    assert greedy(model, ids[0].tolist(), NOISE, 9, stop=lambda new: len(new) == 4) == want[:4]
    assert all(n == 5 for _, n, _ in answer_scores(model, [(ids[0].tolist(), want[:5])], NOISE, bar=False)) # the greedy answer is right in every token


@pytest.mark.parametrize('name', list(RETRIEVAL))
@pytest.mark.parametrize('length', [320, 600])
def test_contexts_fill_their_length(tokenizer, name, length):
    items = retrieval_items(name, tokenizer, length, n=3)
    assert all(.8 * length < len(c) + len(a) <= length and a for c, a in items)
    assert len({tuple(c) for c, _ in items}) == 3 and items == retrieval_items(name, tokenizer, length, n=3)
    for c, a in items:
        text, answer = tokenizer.decode(c), tokenizer.decode(a).strip()
        assert answer in text or name == 'copy' and answer.rstrip('.') in text # nobody could know it otherwise


def test_blanks_between_context_and_answer_belong_to_the_answer(tokenizer):
    c, a = split_tokens(tokenizer, 'The same words again: ', 'river field')
    assert tokenizer.decode(a) == ' river field' and not tokenizer.decode(c).endswith(' ')


def questions(folder, n=40):
    rows = [dict(instruction=f'Please choose the correct answer to the question: The {NOUNS[i % 15]} is?\n\nAnswer1: {ADJECTIVES[i % 15]} Answer2: {ADJECTIVES[(i + 3) % 15]}\n\nAnswer format: answer1/answer2',
                 answer=f'answer{1 + i % 2}') for i in range(n)]
    (folder / 'piqa.test.json').write_text(json.dumps(rows))
    return rows


def test_a_length_that_cannot_be_met_is_refused(tokenizer):
    with pytest.raises(ValueError, match='give a length of at least'): retrieval_items('multikey', tokenizer, 60, n=1)


def test_questions_of_both_kinds(tokenizer, tmp_path):
    assert parse_question(questions(tmp_path)[1]) == ('The river is?', ['cold', 'green'], 1)
    asked = choice_items(tmp_path / 'piqa.test.json', tokenizer, length=60, n=5)
    assert [right for *_, right in asked] == [0, 1, 0, 1, 0] and all(len(items) == 2 for items, *_ in asked)
    with pytest.raises(ValueError, match='too few questions'): choice_items(tmp_path / 'piqa.test.json', tokenizer, length=10**5)


def test_rows_of_every_task(tokenizer, tmp_path):
    questions(tmp_path)
    rows = task_scores(tiny(), tokenizer, CELL, [*RETRIEVAL, 'piqa'], lengths=[320], n=4, qa=tmp_path, bar=False)
    assert {r['data'] for r in rows} == {*RETRIEVAL, 'piqa'} <= set(TASKS) and len(rows) == 12
    assert all(r['method'] == 'rotation' and r['k_bits'] == 3 and r['n'] == 4 and r['stderr'] >= 0 for r in rows)
    assert all(0 <= r['value'] <= 1 for r in rows if r['metric'] == 'accuracy')


# The harness, where it is installed

MULTIPLE = '''
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
'''
GENERATE = '''
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{until: ["."], max_gen_toks: 6, do_sample: false}}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: exact_match}}]
'''
ROLLING = '''
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
'''


def test_the_harness_on_local_files(tokenizer, tmp_path, monkeypatch):
    pytest.importorskip('lm_eval', reason='lm_eval is not installed: pip install lm_eval')
    import lm_eval
    from lm_eval.tasks import TaskManager
    for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'): monkeypatch.setenv(name, '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    model, rng = tiny(), random.Random(0)
    save_model(model, tokenizer, tmp_path / 'model')
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / 'model', dtype=torch.float32).eval()
    docs = []
    for i in range(4):
        question = filler(rng, 500)
        ids = split_tokens(tokenizer, question, ' x')[0][1:]
        new = tokenizer.decode(greedy(reference, ids, NOISE, 6)).replace(EOT, '')
        docs.append(dict(question=question, choices=[' long', ' cold', ' quiet and old'], label=i % 3, answer=new.split('.')[0]))
    (tmp_path / 'docs.jsonl').write_text(''.join(json.dumps(d) + '\n' for d in docs))
    for i, text in enumerate((MULTIPLE, GENERATE, ROLLING)): (tmp_path / f'{i}.yaml').write_text(text.format(file=tmp_path / 'docs.jsonl'))
    register_lm_eval()
    assert register_lm_eval() is register_lm_eval()

    def run(bits):
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        args = dict(pretrained=str(tmp_path / 'model'), bits=bits, window=16, sinks=2, block=8, device='cpu')
        return lm_eval.simple_evaluate(model='ndkv', model_args=args, tasks=['local_choice', 'local_generate', 'local_text'], task_manager=manager, bootstrap_iters=0, log_samples=True)

    exact, two = run('None'), run('2')
    assert exact['results']['local_generate']['exact_match,none'] == 1
    for i, sample in enumerate(sorted(exact['samples']['local_choice'], key=lambda s: s['doc_id'])): # log-likelihoods against one forward pass
        for choice, answer in zip(docs[i]['choices'], sample['filtered_resps']):
            ctx, ans = tokenizer(docs[i]['question'].rstrip())['input_ids'], tokenizer(docs[i]['question'] + choice)['input_ids']
            with torch.no_grad(): logp = reference(torch.tensor([ans])).logits[0].log_softmax(-1)
            want = sum(logp[j - 1, ans[j]].item() for j in range(len(ctx), len(ans)))
            assert abs(float(answer[0]) - want) < 1e-2
    perplexity = lambda r: r['results']['local_text']['word_perplexity,none']
    assert abs(perplexity(two) / perplexity(exact) - 1) > 1e-5 # the quantized cache has been read
