# `make quickstart` and `make test` set up .venv themselves; everything else assumes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart picture test test-all test-faults quality style docs notebook lock bench clean

quickstart: $(VENV)/installed
	rm -rf outputs/quickstart
	$(BIN)/hf-cifar finetune --recipe quickstart --output_dir outputs/quickstart
	$(BIN)/python scripts/quickstart_image.py outputs/quickstart/digit.png
	$(BIN)/hf-cifar predict --model_name_or_path outputs/quickstart --top_k 3 outputs/quickstart/digit.png

picture: quickstart
	$(BIN)/hf-cifar report outputs/quickstart
	$(BIN)/python scripts/report_picture.py outputs/quickstart/report.html docs/report.png

test: $(VENV)/installed quality
	$(BIN)/pytest -n 3 --dist loadfile -q -m 'not slow and not faults'

test-all: $(VENV)/installed quality
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -q

test-faults: $(VENV)/installed
	$(BIN)/pytest -n 2 -q -m faults tests/faults --write-table docs/reliability.md

quality: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed
	$(BIN)/python scripts/generated_pages.py
	$(BIN)/python scripts/api_page.py

# A minute; the committed outputs are those of this run.
notebook: $(VENV)/installed
	$(BIN)/python scripts/run_notebook.py

# The newest versions that setup.cfg admits, with the hashes that PyPI gives; run the tests with them after.
lock: $(VENV)/installed
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile setup.cfg --upgrade --universal --python-version 3.11 \
		--extra bundled --extra dev --generate-hashes --no-config \
		--quiet --output-file requirements.lock

$(VENV)/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[bundled,dev]'
	touch $@

# Gradio needs an older Pillow than the other tests: an environment of what differs, over .venv. The tests of
# the demo use the Python that HF_CIFAR_DEMO_PYTHON names.
.venv-demo/installed: $(VENV)/installed
	$(BIN)/python -m venv .venv-demo
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$(.venv-demo/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"
	.venv-demo/bin/python -m pip install --quiet --editable '.[demo]'
	touch $@

# About 30 minutes; photos: 15. Run nothing else meanwhile.
bench: $(VENV)/installed
	for name in data training settings evaluation head scaling checkpoint photos exported serving batch_prediction; do $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.table

clean:
	rm -rf $(VENV) .venv-demo outputs
