import html.parser
import json
import re
import shutil

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from attacks.report import page, reading
from attacks.scoring import scores
from tests.attacks import synthetic_run
from tests.attacks.scoring.lpips_reference import seeded_lpips
from tff_shadow.errors import UserError


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  root = tmp_path_factory.mktemp('runs')
  synthetic_run.write_run(root / 'retina', size=16, failed=('client_03',))
  synthetic_run.write_run(
    root / 'chest', dataset='chest', defense='shadow', size=16, channels=1, regions=False, seed=4
  )
  runs = [reading.read_run(root / name) for name in ('retina', 'chest')]
  summary = page.write_report(runs, root / 'report', 'Two runs', max_images=5)
  return root / 'report', summary


@pytest.fixture(scope='module')
def text(written):
  return (written[0] / 'report.html').read_text(encoding='utf-8')


def test_what_another_update_shows_is_a_guess(tmp_path):
  synthetic_run.write_run(tmp_path / 'told', size=16, told=True)
  run = reading.read_run(tmp_path / 'told')
  (entry,) = page.write_report([run], tmp_path / 'report', 'Told', max_images=16)['attacks']
  assert entry['better_control'] == 'other_update'
  assert entry['verdict'] != 'leaked'
  shown = (tmp_path / 'report' / 'report.html').read_text(encoding='utf-8')
  # A picture of each image, and a row.
  assert shown.count('Guess: another update') == 16 + 1
  scores.write_scores(tmp_path / 'scores.csv', run.attacks[0].scores)
  header, *rows = (tmp_path / 'scores.csv').read_text(encoding='utf-8').splitlines()
  assert 'other_update_psnr' in header.split(',')
  assert len(rows) == 16


class _Parser(html.parser.HTMLParser):
  """Collects tags with attributes, and complains of tags that are not closed in order."""

  _VOID = ('meta', 'img', 'source', 'br', 'path')

  def __init__(self):
    super().__init__()
    self.tags, self.open = [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self._VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def _parse(text):
  parser = _Parser()
  parser.feed(text)
  assert parser.open == []
  return parser.tags


def test_is_well_formed_and_loads_nothing(text):
  tags = _parse(text)
  names = {tag for tag, _ in tags}
  assert names.isdisjoint({'script', 'link', 'iframe', 'object', 'form', 'base'})
  for _, attributes in tags:
    for key in ('src', 'srcset', 'href'):
      if key in attributes:
        assert attributes[key].startswith(('data:image/png;base64,', '#'))
    assert not any(key.startswith('on') for key in attributes)
  assert '://' not in text
  assert 'url(' not in text
  assert '@import' not in text


def test_every_picture_has_a_text(text):
  images = [attributes for tag, attributes in _parse(text) if tag == 'img']
  assert len(images) > 40
  assert all(attributes['alt'] for attributes in images)


def test_summary_file_is_what_was_returned(written):
  directory, summary = written
  assert json.loads((directory / 'summary.json').read_text()) == summary
  assert sorted(path.name for path in directory.iterdir()) == ['report.html', 'summary.json']


def test_page_shows_the_numbers_of_the_summary(written, text):
  _, summary = written
  plain = re.sub(r'<[^>]*>|\s+', ' ', text)
  plain = re.sub(r'\s+', ' ', plain)
  assert summary['headline'] in plain
  for entry in summary['attacks']:
    assert entry['finding'] in plain
    assert entry['numbers'] in plain
    for set_name in ('attack', 'prior_only', 'mean_image'):
      psnr = entry['metrics'][set_name]['psnr']
      shown = f'{psnr["mean"]:.1f} {psnr["ci95_low"]:.1f} to {psnr["ci95_high"]:.1f}'
      assert shown in plain
    for sentence in entry['threat_model']:
      assert sentence in plain
    f1 = entry['training']['last']['validation/f1']['value']
    assert f'validation/f1 {f1:.4g} 20' in plain
  assert 'failed: the loss became NaN' in plain
  assert 'This data set marks no region' in plain


def test_share_words():
  assert page.share_words(14, 16) == '14 of 16 (88 %)'
  assert page.share_words(0, 3) == '0 of 3 (0 %)'
  assert page.share_words(0, 0) == '–'


def test_page_shows_identification_and_labels(written, text):
  _, summary = written
  for number, entry in enumerate(summary['attacks'], start=1):
    section = text.split(f'id="attack-{number}"')[1].split('</section>')[0]
    plain = re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', section))
    found = entry['identified']
    for precision in found['precisions']:
      shown = page.share_words(precision['correct'], found['of'])
      control = page.share_words(precision['control_correct'], found['control_of'])
      chance = f'{precision["k"]} in {found["choices"]}'
      assert f'{precision["k"]}-IIP by correlation {shown} {control} {chance}' in plain
    multiset = entry['label_accuracy']['multiset']
    assert f'in any order {multiset["correct"]} of {multiset["of"]}' in plain
    rdlv = entry['metrics']['attack']['rdlv']
    assert f' {rdlv["mean"]:.2f} {rdlv["ci95_low"]:.2f} to {rdlv["ci95_high"]:.2f}' in plain
    assert 'LPIPS' not in plain


def test_lpips_is_shown_where_it_was_measured(tmp_path):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=3, size=16)
  measures = reading.Measures(seeded_lpips(tmp_path, 'vgg'), 'run')
  run = reading.read_run(directory, measures)
  summary = page.write_report([run], tmp_path / 'out', 'Title', max_images=1)
  assert json.loads((tmp_path / 'out/summary.json').read_text()) == summary
  text = (tmp_path / 'out/report.html').read_text()
  _parse(text)
  plain = re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', text))
  (entry,) = summary['attacks']
  for set_name in ('attack', 'prior_only', 'mean_image'):
    for metric in ('lpips', 'region_lpips'):
      interval = entry['metrics'][set_name][metric]
      low, high = (page._number(interval[end], 3) for end in ('ci95_low', 'ci95_high'))
      assert f'{interval["mean"]:.3f} {low} to {high}' in plain
  assert '3-IIP by LPIPS' in plain
  assert f'LPIPS by vgg, weights of SHA-256 {measures.lpips.digest[:12]}' in plain
  shown = [row.quality['attack'].lpips for row in run.attacks[0].scores]
  assert f', LPIPS {np.median(shown):.2f}' in plain


def test_table_rows_have_as_many_cells_as_the_head(written, text):
  for table in re.findall(r'<table>.*?</table>', text, re.DOTALL):
    rows = [len(re.findall(r'<t[dh][ >]', row)) for row in table.split('<tr')[1:]]
    assert len(set(rows)) == 1, table


def test_sensitive_region_is_drawn_only_where_there_is_one(text):
  retina, chest = text.split('id="attack-1"')[1].split('id="attack-2"')
  assert retina.count('<svg') == 5
  assert '<svg' not in chest


def test_everything_is_escaped(tmp_path):
  evil = '<script>alert("&\')</script>'
  directory = synthetic_run.write_run(
    tmp_path / 'run', dataset=evil, defense=evil, targets=2, size=8, failed=('client_01',)
  )
  path = directory / 'attacks/pixels/config.json'
  config = json.loads(path.read_text())
  config.update(model=evil, threat_model=[evil], attack={evil: evil})
  path.write_text(json.dumps(config))
  path = directory / 'attacks/pixels/result.json'
  result = json.loads(path.read_text())
  result['targets'][1]['reason'] = evil
  path.write_text(json.dumps(result))
  path = directory / 'config.json'
  path.write_text(json.dumps({'command': [evil, evil], 'versions': {evil: evil}, 'seed': evil}))
  (directory / 'metrics.csv').write_text('round,<script>x/loss\n1,2\n')
  page.write_report([reading.read_run(directory)], tmp_path / 'out', evil, max_images=3)
  text = (tmp_path / 'out/report.html').read_text()
  assert '<script' not in text
  # Title twice, and at least once each: data set, defence, model, threat model, reason, command.
  assert text.count('&lt;script&gt;') > 10
  _parse(text)


def test_same_input_same_page(tmp_path):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=3, size=8)
  for name in ('first', 'second'):
    page.write_report([reading.read_run(directory)], tmp_path / name, 'Title', max_images=3)
  assert (tmp_path / 'first/report.html').read_bytes() == (
    tmp_path / 'second/report.html'
  ).read_bytes()


@pytest.mark.parametrize(
  ('total', 'count', 'ranks'),
  [
    (16, 4, [0, 7, 10, 15]),
    (9, 5, [0, 2, 4, 6, 8]),
    (16, 1, [7]),
    (16, 2, [0, 15]),
    (16, 3, [0, 7, 15]),
    (3, 9, [0, 1, 2]),
    (1, 5, [0]),
    (0, 5, []),
    (5, 0, []),
  ],
)
def test_ranks(total, count, ranks):
  assert page.choose_ranks(total, count) == ranks


@pytest.mark.parametrize('count', [3, 4, 6, 7, 12])
def test_best_median_and_worst_are_always_shown(count):
  for total in range(3, 40):
    ranks = page.choose_ranks(total, count)
    assert {0, (total - 1) // 2, total - 1} <= set(ranks)
    assert ranks == sorted(set(ranks))
    assert len(ranks) == min(total, count)


def test_cases_from_best_to_worst_and_failures_last(tmp_path):
  failed = ('client_01', 'client_04')
  directory = synthetic_run.write_run(tmp_path / 'run', targets=8, size=8, failed=failed)
  (attack,) = reading.read_run(directory).attacks
  cases = page.make_cases(attack, 4)
  assert [case.rank for case in cases] == ['Best of 6', 'Median of 6', 'Worst of 6', 'No result']
  psnrs = [case.score.quality['attack'].psnr for case in cases[:3]]
  assert psnrs == sorted(psnrs, reverse=True)
  assert cases[-1].reconstruction is None
  assert cases[-1].error is None
  assert cases[-1].controls['prior_only'] is not None
  everything = page.make_cases(attack, 20)
  assert [case.rank for case in everything].count('No result') == 2
  assert len(everything) == 8


def test_all_failed_without_controls_still_makes_a_page(tmp_path):
  failed = ('client_00', 'client_01')
  directory = synthetic_run.write_run(tmp_path / 'run', targets=2, size=8, failed=failed)
  path = directory / 'attacks/pixels/reconstructions.safetensors'
  safetensors_numpy.save_file({'unused': np.zeros(1, np.float32)}, path)
  summary = page.write_report([reading.read_run(directory)], tmp_path / 'out', '', max_images=7)
  assert summary['verdict'] == 'inconclusive'
  assert summary['attacks'][0]['metrics']['attack']['psnr']['mean'] is None
  assert 'no usable result on 2 of 2 images' in (tmp_path / 'out/report.html').read_text()


def test_existing_report_is_kept_without_overwrite(tmp_path):
  for name in ('report.html', 'summary.json'):
    directory = tmp_path / name.replace('.', '_')
    directory.mkdir()
    page.check_free(directory, overwrite=False)
    (directory / name).write_text('old')
    with pytest.raises(UserError, match='--overwrite'):
      page.check_free(directory, overwrite=False)
    page.check_free(directory, overwrite=True)


def test_output_directory_that_is_a_file(tmp_path):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=1, size=8)
  (tmp_path / 'out').write_text('')
  with pytest.raises(UserError, match='--output_dir='):
    page.write_report([reading.read_run(directory)], tmp_path / 'out', '', max_images=1)


def test_half_written_report_never_replaces_the_old_one(tmp_path, monkeypatch):
  directory = synthetic_run.write_run(tmp_path / 'run', targets=1, size=8)
  runs = [reading.read_run(directory)]
  page.write_report(runs, tmp_path / 'out', 'old', max_images=1)
  before = (tmp_path / 'out/report.html').read_text()
  shutil.rmtree(directory)

  def break_down(*_, **__):
    raise RuntimeError

  monkeypatch.setattr(page.pictures, 'image_uri', break_down)
  with pytest.raises(RuntimeError):
    page.write_report(runs, tmp_path / 'out', 'new', max_images=1)
  assert (tmp_path / 'out/report.html').read_text() == before
  assert '"title": "old"' in (tmp_path / 'out/summary.json').read_text()
